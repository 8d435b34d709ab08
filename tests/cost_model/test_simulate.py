"""The simulator against an independent discrete-event simulation, against hand counts, and its own bounds."""

import json
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.clock.machine import OwnDevices
from megatron_mosaic.cost_model.clock.run import run_clock
from megatron_mosaic.cost_model.effects.memory import precision_of
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import Overheads
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import count_memory, estimate_memory, estimate_step, simulate, simulate_planned
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.errors import ConfigError, ProfileError, ScheduleError
from megatron_mosaic.plan import Layout, Quota, Recompute, ScheduleChoice
from megatron_mosaic.plan.training import DEFAULT_SETUP, Format, Sharding, TrainingSetup
from megatron_mosaic.schedules import Kind, build_schedule
from megatron_mosaic.schedules.passes import rank_programs
from megatron_mosaic.schedules.timeline import Timeline
from megatron_mosaic.schedules.views.text import render_text
from megatron_mosaic.schedules.views.trace import TracedStep, to_chrome_trace
from tests.cases import BACKBONE_ONLY, WORKLOAD, make_cluster, make_plan, make_profile, plans
from tests.cost_model.oracle_events import assert_as_in_the_oracle, times_of
from tests.goldens import assert_golden

PROFILE = make_profile()
LLM_LANE = 1  # of plans where every module has one stage


def _gpu_model(workload=WORKLOAD, num_ranks=4) -> CostModel:
    return CostModel(workload, make_cluster(num_ranks))


def _local_model(workload=WORKLOAD, num_ranks=4, cores=2) -> CostModel:
    profile = make_profile(workload, cores=cores)
    return CostModel(workload, local_cluster(profile, num_ranks), profile)


@settings(max_examples=40)
@given(plans(world_size=4))
def test_every_action_as_in_the_oracle(plan):
    simulation = simulate(plan, _gpu_model())
    assert_as_in_the_oracle(simulation, plan)


@settings(max_examples=30)
@given(plans(world_size=4), st.integers(1, 4))
def test_shared_cores_as_in_the_oracle(plan, cores):
    simulation = simulate(plan, _local_model(cores=cores))
    assert_as_in_the_oracle(simulation, plan, cores=cores)


@given(plans(world_size=8))
def test_bounds_hold(plan):
    price = _gpu_model(num_ranks=8).price(plan)
    simulation = simulate_planned(price)
    assert price.lower_bound_s <= simulation.step_s * (1 + 1e-9)
    assert price.lower_bound_bytes <= simulation.peak_bytes * (1 + 1e-9)


@given(plans(world_size=4), st.integers(1, 3))
def test_bounds_hold_on_shared_cores(plan, cores):
    price = _local_model(cores=cores).price(plan)
    assert price.lower_bound_s <= simulate_planned(price).step_s * (1 + 1e-9)


@settings(max_examples=40)
@given(plans(world_size=4), st.lists(st.sampled_from([0.25, 0.33, 1.0]), min_size=3, max_size=3), st.booleans())
def test_bounds_hold_beside_each_other_and_behind_hidden_gradients(plan, shares, local):
    quotas = dict(zip(plan.modules, shares))
    modules = {name: replace(m, quota=Quota(share=quotas[name]), unit=1) for name, m in plan.modules.items()}
    beside = replace(plan, modules=modules, schedule=ScheduleChoice("overlap"))
    setup = TrainingSetup(gradient_overlap_frac=0.9)
    model = _local_model() if local else CostModel(WORKLOAD, make_cluster(4), setup=setup)
    price = model.price(beside)
    assert price.lower_bound_s <= simulate_planned(price).step_s * (1 + 1e-9)


def test_the_bound_of_a_rank_with_tracks_is_that_of_its_fullest():
    plan = make_plan({name: ("0", Layout()) for name in ("vision", "llm", "generator")}, world_size=1)
    shares = {"vision": 0.5, "llm": 0.5, "generator": 1.0}
    modules = {name: replace(m, quota=Quota(share=shares[name])) for name, m in plan.modules.items()}
    price = _local_model(num_ranks=1).price(replace(plan, modules=modules, schedule=ScheduleChoice("overlap")))
    vision, llm, generator = (cost.busy_s for cost in price.costs)
    assert price.work.graph.tracks == {"vision": 1}  # who asks for no share takes turns with the backbone
    assert sum((vision, llm, generator)) > simulate_planned(price).step_s
    assert max(vision, llm + generator) < price.lower_bound_s <= simulate_planned(price).step_s


@given(plans(world_size=4))
def test_timeline_says_what_the_simulation_says(plan):
    simulation = simulate(plan, _gpu_model())
    timeline = simulation.timeline()  # its constructor refuses overlaps
    assert timeline.end_s == pytest.approx(simulation.step_s)
    assert {r for ranks in timeline.alike.values() for r in ranks} == {
        r for m in plan.modules.values() for r in m.ranks
    }
    assert {span.rank for span in timeline.spans} == {*timeline.alike}
    price = simulation.price
    for alike, gradients_s, optimizer_s in zip(price.work.classes, price.gradients_s, price.optimizer_s, strict=True):
        tail = {
            s.label: s.end_s - s.start_s
            for s in timeline.spans
            if s.rank == next(r for r, ranks in timeline.alike.items() if alike.ranks.first in ranks)
            and s.label[0] == "~"
        }
        assert tail == pytest.approx({"~grads": gradients_s, "~optimizer": optimizer_s})
    programs = rank_programs(plan, build_schedule(plan, WORKLOAD))
    for rank in timeline.alike:
        program = programs[rank]
        assert all(programs[other] == program for other in timeline.alike[rank])
        spans = sorted((s for s in timeline.spans if s.rank == rank and s.lane[0] != "~"), key=lambda s: s.start_s)
        assert [s.label for s in spans] == [str(a) for a in program]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(spans))


def test_as_many_cores_as_threads_is_no_contention():
    plan = make_plan(
        {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("2-3", Layout(dp=2))}
    )
    model = _local_model(cores=4)
    quarter = {
        n: replace(m, quota=Quota(share=0.25)) for n, m in plan.modules.items()
    }  # one thread for each of 4 ranks
    crowded = simulate(replace(plan, modules=quarter), model)
    job_s, lag_s = times_of(crowded)
    alone = run_clock(crowded.program, job_s, lag_s, OwnDevices())
    assert crowded.end_s == pytest.approx(alone[1])
    assert max(simulate(replace(plan, modules=quarter), _local_model(cores=3)).end_s) > 1.1 * max(crowded.end_s)


def test_four_ranks_on_two_cores_take_twice_as_long():
    # one thread a rank, all ranks busy all the time: each runs at rate 2/4
    plan = make_plan({"llm": ("0-3", Layout(dp=4))}, workload=BACKBONE_ONLY, global_batch_size=8)
    half = replace(plan, modules={"llm": replace(plan.modules["llm"], quota=Quota(share=0.5))})
    simulation = simulate(half, _local_model(BACKBONE_ONLY))
    cost = simulation.price.costs[0]
    assert cost.threads == 4
    assert max(simulation.end_s) == pytest.approx(2 * cost.busy_s)
    # 1 item: parts 0.1 + 4 x 1 + 0.2 of 2 ms forward, twice that backward, two microbatches
    assert cost.busy_s == pytest.approx(2 * 4.3 * 2e-3 * 3)


def test_a_tp_group_that_slowed_itself_is_not_slowed_twice():
    # four ranks with a thread each were measured on two cores: the factor 2 is in the profile, and taken out of it
    model = _local_model(BACKBONE_ONLY)
    plan = make_plan({"llm": ("0-3", Layout(tp=4))}, workload=BACKBONE_ONLY, world_size=4)
    full = model.price(plan).costs[0]
    assert (full.threads, full.seconds(Kind.F)) == (4, pytest.approx(4.3 * 2e-3 / 4 / 2))  # a thread on each rank
    simulation = simulate(plan, model)
    assert max(simulation.end_s) == pytest.approx(16 * 4.3 * 2e-3 / 4 * 3)  # as measured


def test_a_step_on_this_machine_begins_with_its_data_and_agrees_twice():
    # closed form: 16 samples on 4 ranks of 2 cores take 16 * 2 ms * 2; then as without them; the all-reduces of
    # token count and norm lie on the made-up curve (1.09009e-4 s + 0.990991e-9 s/byte, 64 bytes)
    profile = make_profile(BACKBONE_ONLY)
    loading = profile.model_copy(update={"overheads": Overheads(sample_s=2e-3)})
    plan = make_plan({"llm": ("0-3", Layout(tp=4))}, workload=BACKBONE_ONLY, world_size=4)
    cluster = local_cluster(profile, 4)
    without, with_data = (simulate(plan, CostModel(BACKBONE_ONLY, cluster, p)) for p in (profile, loading))
    assert with_data.step_s == pytest.approx(without.step_s + 16 * 2e-3 * 2)
    assert min(with_data.start_s) == pytest.approx(16 * 2e-3 * 2)
    spans = sorted(with_data.timeline().spans, key=lambda span: span.start_s)
    labels = [span.label for span in spans if span.rank == 0]
    assert labels[0] == "~data" and labels[-2:] == ["~grads", "~optimizer"]
    consensus_s = 1.09009e-4 + 64 * 0.990991e-9
    assert with_data.price.consensus_s == pytest.approx(consensus_s, rel=1e-4)
    assert with_data.optimizer_start_s == pytest.approx(max(with_data.end_s) + consensus_s, rel=1e-4)


@pytest.mark.parametrize("key", ["flops_per_s", "memory_bytes_per_s"])
@given(plan=plans(world_size=4))
def test_a_faster_gpu_is_never_slower(key, plan):
    cluster = make_cluster(4)
    faster = replace(cluster, gpu=replace(cluster.gpu, **{key: 2 * getattr(cluster.gpu, key)}))
    before, after = (CostModel(WORKLOAD, c).price(plan) for c in (cluster, faster))
    for old, new in zip(before.costs, after.costs, strict=True):
        assert all(new.seconds(kind) <= old.seconds(kind) for kind in (Kind.F, Kind.B))


def test_more_items_or_recomputation_cost_more():
    model = _gpu_model()
    plan = make_plan({"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0", Layout())})
    once, twice = model.price(plan), model.price(replace(plan, micro_batch_size=2))
    for before, after in zip(once.work.lanes, twice.work.lanes, strict=True):
        assert after.work.items == 2 * before.work.items
    for before, after in zip(once.costs, twice.costs, strict=True):
        assert after.seconds(Kind.B) > before.seconds(Kind.B)
    for recompute in (Recompute.selective, Recompute.full):
        again = model.price(
            replace(plan, modules={n: replace(m, recompute=recompute) for n, m in plan.modules.items()})
        )
        assert again.costs[LLM_LANE].seconds(Kind.B) > once.costs[LLM_LANE].seconds(Kind.B)
        assert again.costs[LLM_LANE].memory.unit_bytes <= once.costs[LLM_LANE].memory.unit_bytes


@pytest.mark.parametrize("frozen", [False, True])
def test_a_whole_forward_again_costs_a_forward(frozen):
    """On a GPU exactly; with tensor parallelism too, and where only a projector is trained."""
    vision = replace(WORKLOAD.modules[0], frozen=frozen, trains_projector=frozen)
    workload = replace(WORKLOAD, modules=(vision, *WORKLOAD.modules[1:]))
    plan = make_plan(
        {"vision": ("0-3", Layout(dp=2, tp=2)), "llm": ("0-3", Layout(pp=2, tp=2)), "generator": ("0", Layout())},
        workload=workload,
    )
    again = replace(plan, modules={n: replace(m, recompute=Recompute.whole) for n, m in plan.modules.items()})
    for model in (_gpu_model(workload), _local_model(workload)):
        action_s = model.price(plan).source.overheads.action_s  # of two actions, an action's is saved
        for before, after in zip(model.price(plan).costs, model.price(again).costs, strict=True):
            assert after.seconds(Kind.F) == before.seconds(Kind.F)
            expected = before.seconds(Kind.B) + before.seconds(Kind.F) - action_s
            assert after.seconds(Kind.B) == pytest.approx(expected)


def test_an_item_is_not_split():
    few = replace(
        WORKLOAD,
        modules=tuple(replace(m, items_per_sample=0.3) if m.name == "generator" else m for m in WORKLOAD.modules),
    )
    plan = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0-3", Layout(dp=4))}
    )
    assert list_stage_work(plan, few, 4).lanes[-1].work.items == 1  # 1.2 items on 4 dp slots
    assert list_stage_work(replace(plan, micro_batch_size=4), few, 4).lanes[-1].work.items == 2  # 4.8


def test_tp_communication_is_two_all_reduces_a_layer():
    # Shoeybi et al. 2019; 4 layers, [64 tokens, 1 item, 64] of 2 bytes over two ranks at 100 GB/s and 1 us
    plan = make_plan({"llm": ("0-1", Layout(tp=2))}, workload=BACKBONE_ONLY)
    work = list_stage_work(plan, BACKBONE_ONLY, 4).lanes[0].work
    cost = _gpu_model(BACKBONE_ONLY).source.action_cost(work, Kind.F)
    assert cost.comm_s == pytest.approx(4 * 2 * (2e-6 + 64 * 64 * 2 / 100e9))


def test_equal_lanes_need_no_transfer():
    same = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0-1", Layout(dp=2))}
    )
    price = _gpu_model().price(same)
    vision, llm, generator = range(3)
    assert price.transfer_s(vision, llm) == 0
    # one item of 16 rows of 64 bf16 values for each llm slot, two for each generator slot: the larger message counts
    assert price.transfer_s(llm, generator) == pytest.approx(1e-6 + 2 * 16 * 64 * 2 / 100e9)
    assert price.transfer_s(generator, llm) == price.transfer_s(llm, generator)


@settings(max_examples=30)
@given(plans(world_size=4), st.integers(7, 12), st.integers(0, 3))
def test_the_estimate_is_close_on_long_steps(plan, factor, unit):
    modules = {**plan.modules, "vision": replace(plan.modules["vision"], unit=unit)}
    batch = plan.micro_batch_size * plan.modules["llm"].layout.dp * factor * 12
    price = _gpu_model().price(replace(plan, modules=modules, global_batch_size=batch))
    estimate, simulation = estimate_step(price), simulate_planned(price)
    assert estimate.step_s == pytest.approx(simulation.step_s, rel=0.05)
    assert len(estimate.simulation.end_s) < len(simulation.end_s) or estimate.step_s == simulation.step_s


@pytest.mark.parametrize("microbatches", [64, 67])
def test_the_estimate_of_an_interleaved_pipeline_is_exact(microbatches):
    # Whole turns of as many microbatches as the pipeline is long; 67 leaves the same rest in the short steps
    deep = replace(BACKBONE_ONLY, modules=(replace(BACKBONE_ONLY.modules[0], num_layers=8),))
    plan = make_plan({"llm": ("0-3", Layout(pp=4, vpp=2))}, workload=deep, global_batch_size=microbatches)
    price = _gpu_model(deep).price(replace(plan, schedule=ScheduleChoice("interleaved")))
    estimate = estimate_step(price)
    assert estimate.simulation.program.schedule.num_microbatches < microbatches
    assert estimate.step_s == pytest.approx(simulate_planned(price).step_s, rel=1e-9)


def test_peak_without_a_clock_is_the_simulated_one():
    plan = make_plan(
        {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("2-3", Layout(dp=2))}
    )
    simulation = simulate(plan, _gpu_model())
    held = estimate_memory(plan, WORKLOAD, DEFAULT_SETUP)
    assert held == simulation.memory()  # by what holds it, and for ranks that do the same
    assert [str(ranks) for ranks in held] == ["0-1", "2-3"]
    assert max(peak.total for peak in held.values()) == pytest.approx(simulation.peak_bytes)
    assert [peak.total for peak in held.values()] == pytest.approx(simulation.class_peak_bytes)


def test_memory_follows_format_and_sharding():
    plan = make_plan({"llm": ("0-3", Layout(dp=4))}, workload=BACKBONE_ONLY)
    bytes_of = {}
    for number_format, sharding in product((Format.fp32, Format.bf16), (Sharding.none, Sharding.optimizer)):
        setup = TrainingSetup(format=number_format, sharding=sharding)
        (bytes_of[number_format, sharding],) = estimate_memory(plan, BACKBONE_ONLY, setup).values()
        assert precision_of(setup).name == number_format
    simulated = simulate(plan, CostModel(BACKBONE_ONLY, make_cluster(4), setup=setup))
    assert [*simulated.memory().values()] == [bytes_of[Format.bf16, Sharding.optimizer]]
    fp32, bf16 = (bytes_of[key, Sharding.none] for key in (Format.fp32, Format.bf16))
    assert (fp32.parameters, fp32.gradients) == (2 * bf16.parameters, bf16.gradients)
    assert fp32.optimizer == bf16.optimizer * 8 / 12  # two moments; and the fp32 copy of 16-bit parameters
    for number_format in (Format.fp32, Format.bf16):
        whole, shard = (bytes_of[number_format, each].optimizer for each in (Sharding.none, Sharding.optimizer))
        assert shard == whole / 4


def test_no_gpu_has_a_peak_of_fp32_products():
    with pytest.raises(ConfigError, match="no source for the peak of fp32"):
        CostModel(WORKLOAD, make_cluster(4), setup=TrainingSetup(format=Format.fp32))


def test_pipeline_stages_hold_their_live_units():
    # 1F1B over 4 stages: stage s keeps 4 - s units alive (Narayanan et al. 2021)
    plan = make_plan({"llm": ("0-3", Layout(pp=4))}, workload=BACKBONE_ONLY)
    model = _gpu_model(BACKBONE_ONLY)
    simulation = simulate(plan, model)
    for stage, (peak, cost) in enumerate(zip(simulation.class_peak_bytes, simulation.price.costs, strict=True)):
        memory = cost.memory
        expected = memory.static_bytes + (4 - stage) * memory.unit_bytes + memory.workspace_bytes
        assert peak == pytest.approx(expected)


def test_local_needs_a_profile_of_the_workload():
    cluster = local_cluster(PROFILE, 4)
    with pytest.raises(ProfileError, match="no profile"):
        CostModel(WORKLOAD, cluster)
    other = replace(WORKLOAD, modules=(replace(WORKLOAD.modules[0], hidden_size=32), *WORKLOAD.modules[1:]))
    with pytest.raises(ProfileError) as caught:
        CostModel(other, cluster, PROFILE)
    assert other.digest in caught.value.expected
    assert "mosaic calibrate" in caught.value.fix


def test_unbuilt_schedule_is_refused():
    plan = make_plan({"llm": ("0-3", Layout(dp=4))}, workload=BACKBONE_ONLY)
    with pytest.raises(ScheduleError, match="waves"):
        simulate(replace(plan, schedule=ScheduleChoice("waves")), _gpu_model(BACKBONE_ONLY))


def test_timeline_golden():
    plan = make_plan(
        {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("2-3", Layout(dp=2))},
        global_batch_size=8,
    )
    assert_golden("simulated", render_text(simulate(plan, _local_model()).timeline()) + "\n")


def test_overheads_are_added():
    data = make_profile(BACKBONE_ONLY).model_dump()
    plan = make_plan({"llm": ("0", Layout())}, workload=BACKBONE_ONLY, world_size=1, global_batch_size=2)
    plain = make_profile(BACKBONE_ONLY)
    slow = type(plain).model_validate({**data, "overheads": {"action_s": 0.5, "step_s": 7.0}})
    before, after = (simulate(plan, CostModel(BACKBONE_ONLY, local_cluster(p, 1), p)).step_s for p in (plain, slow))
    assert after - before == pytest.approx(4 * 0.5 + 7)


def test_trace_has_an_arrow_for_every_need_and_counts_up_to_the_peak():
    plan = make_plan(
        {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("2-3", Layout(dp=2))},
        global_batch_size=8,
    )
    simulation = simulate(plan, _gpu_model())
    timeline, schedule = simulation.timeline(), simulation.program.schedule
    assert isinstance(timeline, Timeline)
    memory = count_memory(simulation)
    step = TracedStep(title="predicted", timeline=timeline, memory=memory)
    events = json.loads(to_chrome_trace([step], schedule))["traceEvents"]
    needs = sum(need.lane != action.lane for action in schedule.order for need in schedule.needs(action))
    starts, ends = ({e["id"]: e for e in events if e["ph"] == kind} for kind in "sf")
    assert len(starts) == len(ends) == needs > 0
    slices = [e for e in events if e["ph"] == "X" and e["name"][0] != "~" and e["name"] != "bubble"]

    def at(arrow):
        return {
            e["name"] for e in slices
            if (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])
            and e["ts"] <= arrow["ts"] < e["ts"] + e["dur"] - 1e-6  # microseconds: the next begins as one ends
        }  # fmt: skip

    found = {(*at(starts[i]), *at(ends[i])) for i in starts}
    assert found == {
        (str(need), str(action)) for action in schedule.order for need in schedule.needs(action)
        if need.lane != action.lane
    }  # fmt: skip
    peaks = {alike.ranks.first: peak for alike, peak in zip(simulation.price.work.classes, simulation.class_peak_bytes)}
    for rank, samples in memory.items():
        assert max(sum(held.values()) for _, held in samples) == pytest.approx(peaks[rank])
        assert sum(samples[-1][1].values()) == pytest.approx(sum(samples[0][1].values()))  # all is freed
