"""The simulator against closed forms, against an independent discrete-event simulation (simpy), and its own bounds."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.memory import BF16, estimate_memory, precision_of
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import Overheads
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import price_plan
from megatron_mosaic.cost_model.simulate import estimate_step_s, prepare_program, simulate, simulate_program
from megatron_mosaic.errors import ProfileError, ScheduleError
from megatron_mosaic.plan import Layout, Plan, Quota, Recompute, ScheduleChoice
from megatron_mosaic.schedules import build_schedule
from megatron_mosaic.schedules.passes import rank_programs, stage_ranks
from megatron_mosaic.schedules.timeline import render_text
from tests.cases import BACKBONE_ONLY, WORKLOAD, make_cluster, make_plan, make_profile, plans
from tests.goldens import assert_golden

PROFILE = make_profile()


def _gpu_model(workload=WORKLOAD, num_ranks=4) -> CostModel:
    return CostModel(workload, make_cluster(num_ranks))


def _local_model(workload=WORKLOAD, num_ranks=4, cores=2) -> CostModel:
    profile = make_profile(workload, cores=cores)
    return CostModel(workload, local_cluster(profile, num_ranks), profile)


def _alone_oracle(plan: Plan, model: CostModel) -> dict[str, tuple[float, float]]:
    """Every rank is a process that works through its program; ranks of a stage meet, then run together."""
    schedule = build_schedule(plan, model.workload)
    env = simpy.Environment()
    done = {action: env.event() for lane in schedule.lanes.values() for action in lane}
    arrived = dict.fromkeys(done, 0)
    everyone_here = {action: env.event() for action in done}
    times: dict[str, tuple[float, float]] = {}

    def needed(need, action):
        yield done[need]
        if need.lane != action.lane:
            ends = (need.module, need.stage), (action.module, action.stage)
            yield env.timeout(model.transfer_s(plan, *ends))

    def act(action):
        inputs = [env.process(needed(need, action)) for need in schedule.needs(action)]
        yield env.all_of([everyone_here[action], *inputs])
        start = env.now
        cost = model.action_cost(plan, action.module, action.stage, backward=action.kind == "B")
        yield env.timeout(cost.busy_s)
        times[str(action)] = (start, env.now)
        done[action].succeed()

    def rank_process(program):
        for action in program:
            arrived[action] += 1
            if arrived[action] == len(stage_ranks(plan, action.module, action.stage)):
                everyone_here[action].succeed()
            yield done[action]

    for action in done:
        env.process(act(action))
    for program in rank_programs(plan, schedule).values():
        env.process(rank_process(program))
    env.run()
    return times


@dataclass
class _Cores:
    """Processor sharing as a simpy process: jobs advance at min(1, cores / threads at work)."""

    env: simpy.Environment
    cores: int

    def __post_init__(self) -> None:
        self.jobs: dict[simpy.Event, list[float]] = {}  # finished -> [work left, threads]
        self.changed = self.env.event()
        self.env.process(self._serve())

    def run(self, work: float, threads: int) -> simpy.Event:
        finished = self.env.event()
        self.jobs[finished] = [work, threads]
        self.changed.succeed()
        self.changed = self.env.event()
        return finished

    def _serve(self):
        while True:
            if not self.jobs:
                yield self.changed
                continue
            rate = min(1.0, self.cores / sum(threads for _, threads in self.jobs.values()))
            since = self.env.now
            soonest = min(work for work, _ in self.jobs.values()) / rate
            yield self.changed | self.env.timeout(soonest)
            for finished, job in list(self.jobs.items()):
                job[0] -= (self.env.now - since) * rate
                if job[0] < 1e-12:
                    del self.jobs[finished]
                    finished.succeed()


def _shared_oracle(plan: Plan, model: CostModel) -> float:
    """End of the last action when all ranks compute on the same cores; transfers are free."""
    schedule = build_schedule(plan, model.workload)
    env = simpy.Environment()
    cores = _Cores(env, model.cluster.shared_cores)
    done = {action: env.event() for lane in schedule.lanes.values() for action in lane}
    meeting = {action: simpy.Container(env, init=0) for action in done}
    last = [0.0]

    def rank_process(rank, program):
        for action in program:
            ranks = stage_ranks(plan, action.module, action.stage)
            yield meeting[action].put(1)
            if rank == ranks[0]:
                yield meeting[action].get(len(ranks))
                yield env.all_of([done[need] for need in schedule.needs(action)])
                cost = model.action_cost(plan, action.module, action.stage, backward=action.kind == "B")
                yield cores.run(cost.busy_s, cost.threads * len(ranks))
                last[0] = env.now
                done[action].succeed()
            else:
                yield done[action]

    for rank, program in rank_programs(plan, schedule).items():
        env.process(rank_process(rank, program))
    env.run(until=env.all_of(list(done.values())))
    return last[0]


@settings(max_examples=40)
@given(plans(world_size=4))
def test_every_action_as_in_the_oracle(plan):
    model = _gpu_model()
    simulation = simulate(plan, model)
    expected = _alone_oracle(plan, model)
    for position, action in enumerate(simulation.priced.program.actions):
        assert (simulation.start_s[position], simulation.end_s[position]) == pytest.approx(expected[str(action)])


@settings(max_examples=30)
@given(plans(world_size=4), st.integers(1, 4))
def test_shared_cores_as_in_the_oracle(plan, cores):
    model = _local_model(cores=cores)
    priced = prepare_program(price_plan(plan, model))
    free = replace(priced, transfers=dict.fromkeys(priced.transfers, 0.0))
    assert max(simulate_program(free).end_s) == pytest.approx(_shared_oracle(plan, model), rel=1e-6)


@given(plans(world_size=8))
def test_bounds_hold(plan):
    model = _gpu_model(num_ranks=8)
    price = price_plan(plan, model)
    simulation = simulate_program(prepare_program(price))
    assert price.lower_bound_s <= simulation.step_s * (1 + 1e-9)
    assert price.lower_bound_bytes <= simulation.peak_bytes * (1 + 1e-9)


@given(plans(world_size=4), st.integers(1, 3))
def test_bounds_hold_on_shared_cores(plan, cores):
    price = price_plan(plan, _local_model(cores=cores))
    assert price.lower_bound_s <= simulate_program(prepare_program(price)).step_s * (1 + 1e-9)


@given(plans(world_size=4))
def test_timeline_says_what_the_simulation_says(plan):
    simulation = simulate(plan, _gpu_model())
    timeline = simulation.timeline()  # its constructor refuses overlaps
    assert timeline.end_s == pytest.approx(simulation.step_s)
    assert {span.rank for span in timeline.spans} == {r for m in plan.modules.values() for r in m.ranks.ranks}
    programs = rank_programs(plan, build_schedule(plan, WORKLOAD))
    for rank, program in programs.items():
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
    priced = prepare_program(price_plan(replace(plan, modules=quarter), model))
    crowded = simulate_program(priced)
    alone = simulate_program(replace(priced, price=replace(priced.price, model=_Uncontended(model))))
    assert crowded.end_s == pytest.approx(alone.end_s)


class _Uncontended:
    """A cost model whose ranks own their cores."""

    def __init__(self, model: CostModel) -> None:
        self.workload, self.profile = model.workload, None
        self.cluster = replace(model.cluster, shared_cores=0)


def test_four_ranks_on_two_cores_take_twice_as_long():
    # one thread a rank, all ranks busy all the time: each runs at rate 2/4
    plan = make_plan({"llm": ("0-3", Layout(dp=4))}, workload=BACKBONE_ONLY, global_batch_size=8)
    half = replace(plan, modules={"llm": replace(plan.modules["llm"], quota=Quota(share=0.5))})
    simulation = simulate(half, _local_model(BACKBONE_ONLY))
    cost = simulation.priced.price.costs[0]
    assert cost.threads == 4
    assert max(simulation.end_s) == pytest.approx(2 * cost.busy_s)
    # 1 item: parts 0.1 + 4 x 1 + 0.2 of 2 ms forward, twice that backward, two microbatches
    assert cost.busy_s == pytest.approx(2 * 4.3 * 2e-3 * 3)


def test_a_tp_group_that_slowed_itself_is_not_slowed_twice():
    # four ranks with a thread each were measured on two cores: the factor 2 is in the profile, and taken out of it
    model = _local_model(BACKBONE_ONLY)
    plan = make_plan({"llm": ("0-3", Layout(tp=4))}, workload=BACKBONE_ONLY, world_size=4)
    full = model.action_cost(plan, "llm", 0, backward=False)
    assert (full.threads, full.busy_s) == (1, pytest.approx(4.3 * 2e-3 / 4 / 2))
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
    labels = [span.label for span in spans if span.rank == 3]
    assert labels[0] == "~data" and labels[-2:] == ["~grads", "~optimizer"]
    consensus_s = 1.09009e-4 + 64 * 0.990991e-9
    assert with_data.priced.price.consensus_s == pytest.approx(consensus_s, rel=1e-4)
    assert with_data.optimizer_start_s == pytest.approx(max(with_data.end_s) + consensus_s, rel=1e-4)


@pytest.mark.parametrize("key", ["flops_per_s", "memory_bytes_per_s"])
@given(plan=plans(world_size=4))
def test_a_faster_gpu_is_never_slower(key, plan):
    cluster = make_cluster(4)
    faster = replace(cluster, gpu=replace(cluster.gpu, **{key: 2 * getattr(cluster.gpu, key)}))
    before, after = (price_plan(plan, CostModel(WORKLOAD, c)) for c in (cluster, faster))
    for old, new in zip(before.costs, after.costs, strict=True):
        assert new.forward_s <= old.forward_s
        assert new.backward_s <= old.backward_s


def test_more_items_or_recomputation_cost_more():
    model = _gpu_model()
    plan = make_plan({"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0", Layout())})
    double = replace(plan, micro_batch_size=2)
    for module in ("vision", "llm", "generator"):
        assert model.items_of_action(double, module) == 2 * model.items_of_action(plan, module)
        assert (
            model.action_cost(double, module, 0, backward=True).busy_s
            > model.action_cost(plan, module, 0, backward=True).busy_s
        )
    for recompute in (Recompute.selective, Recompute.full):
        again = replace(plan, modules={n: replace(m, recompute=recompute) for n, m in plan.modules.items()})
        assert (
            model.action_cost(again, "llm", 0, backward=True).busy_s
            > model.action_cost(plan, "llm", 0, backward=True).busy_s
        )
        assert model.lane_memory(again, "llm", 0).unit_bytes <= model.lane_memory(plan, "llm", 0).unit_bytes


def test_an_item_is_not_split():
    few = replace(
        WORKLOAD,
        modules=tuple(replace(m, items_per_sample=0.3) if m.name == "generator" else m for m in WORKLOAD.modules),
    )
    plan = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0-3", Layout(dp=4))}
    )
    assert CostModel(few, make_cluster(4)).items_of_action(plan, "generator") == 1  # 1.2 items on 4 lanes
    assert CostModel(few, make_cluster(4)).items_of_action(replace(plan, micro_batch_size=4), "generator") == 2  # 4.8


def test_tp_communication_is_two_all_reduces_a_layer():
    # Shoeybi et al. 2019; 4 layers, [64 tokens, 1 item, 64] of 2 bytes over two ranks at 100 GB/s and 1 us
    plan = make_plan({"llm": ("0-1", Layout(tp=2))}, workload=BACKBONE_ONLY)
    cost = _gpu_model(BACKBONE_ONLY).action_cost(plan, "llm", 0, backward=False)
    assert cost.tp_comm_s == pytest.approx(4 * 2 * (2e-6 + 64 * 64 * 2 / 100e9))


def test_equal_lanes_need_no_transfer():
    model = _gpu_model()
    same = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0-1", Layout(dp=2))}
    )
    assert model.transfer_s(same, ("vision", 0), ("llm", 0)) == 0
    # one item of 16 rows of 64 bf16 values for each llm lane, two for each generator lane: the larger message counts
    assert model.transfer_s(same, ("llm", 0), ("generator", 0)) == pytest.approx(1e-6 + 2 * 16 * 64 * 2 / 100e9)


@settings(max_examples=30)
@given(plans(world_size=4), st.integers(7, 12))
def test_the_estimate_is_close_on_long_steps(plan, factor):
    long = replace(plan, global_batch_size=plan.micro_batch_size * plan.modules["llm"].layout.dp * factor * 12)
    price = price_plan(long, _gpu_model())
    assert estimate_step_s(price) == pytest.approx(simulate_program(prepare_program(price)).step_s, rel=0.05)


def test_peak_without_a_clock_is_the_simulated_one():
    plan = make_plan(
        {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("2-3", Layout(dp=2))}
    )
    memory = estimate_memory(plan, WORKLOAD, BF16)
    simulation = simulate(plan, _gpu_model())
    assert max(held.total for held in memory.values()) == pytest.approx(simulation.peak_bytes)
    assert list(memory) == [0, 1, 2, 3]
    # by what holds it, and for ranks that do the same
    for peak, held in zip(simulation.priced.peak_bytes, simulation.memory(), strict=True):
        assert held.total == pytest.approx(peak)
    for ranks, held in zip(simulation.ranks_alike().values(), simulation.memory(), strict=True):
        assert all(memory[rank] == held for rank in ranks.ranks)
    assert precision_of(plan).value_bytes == 4  # no prediction: the CPU runtime


def test_pipeline_stages_hold_their_live_units():
    # 1F1B over 4 stages: stage s keeps 4 - s units alive (Narayanan et al. 2021)
    plan = make_plan({"llm": ("0-3", Layout(pp=4))}, workload=BACKBONE_ONLY)
    model = _gpu_model(BACKBONE_ONLY)
    simulation = simulate(plan, model)
    for stage, peak in enumerate(simulation.priced.peak_bytes):
        assert peak == pytest.approx(model.lane_memory(plan, "llm", stage).at(4 - stage).total)


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
