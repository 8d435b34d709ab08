"""The clock: its fast paths against its events, tracks against the oracle, folded ranks against single ones."""

from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.clock.machine import OwnDevices, SharedCores
from megatron_mosaic.cost_model.clock.program import fold
from megatron_mosaic.cost_model.clock.replicas import MAX_CLASSES, SlotClasses
from megatron_mosaic.cost_model.clock.run import run_clock, run_events
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import Simulation, simulate, simulate_program
from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Layout, Plan, ScheduleChoice
from megatron_mosaic.schedules import Action, Kind, Schedule, build_schedule, stage_graph
from megatron_mosaic.schedules.passes import schedule_in_turns
from tests.cases import BACKBONE_ONLY, WORKLOAD, make_cluster, make_plan, make_profile, plans
from tests.cost_model.oracle_events import assert_as_in_the_oracle, by_rank, find_hand_over, find_slots, times_of


def _gpu_model(num_ranks: int = 4) -> CostModel:
    return CostModel(WORKLOAD, make_cluster(num_ranks))


def _local_model(cores: int) -> CostModel:
    profile = make_profile(WORKLOAD, cores=cores)
    return CostModel(WORKLOAD, local_cluster(profile, 4), profile)


@st.composite
def plans_with_tracks(draw: st.DrawFn) -> tuple[Plan, Schedule]:
    """A plan, and its schedule with its lanes on up to three tracks."""
    plan = draw(plans(world_size=4))
    schedule = build_schedule(plan, WORKLOAD)
    tracks = draw(st.lists(st.integers(0, 2), min_size=len(schedule.lanes), max_size=len(schedule.lanes)))
    return plan, replace(schedule, tracks=dict(zip(schedule.lanes, tracks, strict=True)))


@settings(max_examples=40)
@given(plans(world_size=4), st.sampled_from([{}, {"vision": 2}, {"vision": 3}]))
def test_one_pass_gives_the_times_of_the_events(plan, units):
    modules = {name: replace(placed, unit=units.get(name, 0)) for name, placed in plan.modules.items()}
    simulation = simulate(replace(plan, modules=modules), _gpu_model())
    job_s, lag_s = times_of(simulation)
    starts, ends = run_events(simulation.program, job_s, lag_s, OwnDevices())
    assert simulation.start_s == pytest.approx(starts, rel=1e-9, abs=1e-12)
    assert simulation.end_s == pytest.approx(ends, rel=1e-9, abs=1e-12)


@settings(max_examples=20)
@given(plans(world_size=4), st.integers(1, 4), st.floats(1, 3), st.floats(1, 3))
def test_equal_rates_give_the_times_of_the_events(plan, cores, two, more):
    simulation = simulate(plan, _local_model(cores))
    job_s, lag_s = times_of(simulation)
    threads = tuple([cost.threads for cost in simulation.price.costs])
    of_slots = tuple(threads[lane] for lane in simulation.program.lane_of)
    machine = SharedCores(cores=cores, threads=of_slots, slow_downs=((2, two), (4, two * more)))
    starts, ends = run_events(simulation.program, job_s, lag_s, machine)
    found = run_clock(simulation.program, job_s, lag_s, machine)
    assert found[0] == pytest.approx(starts, rel=1e-9, abs=1e-11)
    assert found[1] == pytest.approx(ends, rel=1e-9, abs=1e-11)


def test_threads_slow_each_other_down_as_measured():
    plain = SharedCores(cores=2, threads=())
    assert [plain.crowding(n) for n in (1, 2, 3, 8)] == [1, 1, 1.5, 4]
    measured = SharedCores(cores=2, threads=(), slow_downs=((2, 1.2), (4, 2.6)))
    # between 2 and 4 on a straight line; beyond, as many more turns; alone, nobody is in the way
    assert [measured.crowding(n) for n in (1, 2, 3, 4, 8)] == pytest.approx([1, 1.2, 1.9, 2.6, 5.2])
    # what was measured with fewer ranks than cores goes on in turns from there
    few = SharedCores(cores=4, threads=(), slow_downs=((2, 1.1),))
    assert [few.crowding(n) for n in (2, 4, 8)] == pytest.approx([1.1, 1.1, 2.2])
    # turns are never fewer than threads over cores
    lucky = SharedCores(cores=1, threads=(), slow_downs=((2, 1.5),))
    assert lucky.crowding(2) == 2


@settings(max_examples=30)
@given(plans_with_tracks())
def test_tracks_run_at_the_same_time_as_in_the_oracle(case):
    plan, schedule = case
    assert_as_in_the_oracle(simulate(plan, _gpu_model(), schedule), plan)


@settings(max_examples=20)
@given(plans_with_tracks(), st.integers(1, 3))
def test_tracks_share_cores_as_in_the_oracle(case, cores):
    plan, schedule = case
    assert_as_in_the_oracle(simulate(plan, _local_model(cores), schedule), plan, cores=cores)


def test_lanes_of_one_rank_take_turns_on_a_track_and_overlap_on_two():
    plan = make_plan({"vision": ("0", Layout()), "llm": ("0", Layout()), "generator": ("1", Layout())}, world_size=2)
    schedule = build_schedule(plan, WORKLOAD)
    turns, tracks = (
        simulate(plan, _gpu_model(), each) for each in (schedule, replace(schedule, tracks={"vision.0": 1}))
    )
    assert not _overlap(turns, "vision", "llm")
    assert _overlap(tracks, "vision", "llm")
    assert tracks.step_s < turns.step_s


def _overlap(simulation: Simulation, one: str, other: str) -> bool:
    order = [simulation.program.schedule.order[at] for at in simulation.program.entry]
    spans = list(zip(order, simulation.start_s, simulation.end_s))
    return any(
        a.module == one and b.module == other and a_start < b_end and b_start < a_end
        for a, a_start, a_end in spans
        for b, b_start, b_end in spans
    )


APART = {"vision": ("0-199", Layout(dp=200)), "llm": ("200-839", Layout(tp=8, pp=4, dp=20)),
         "generator": ("840-999", Layout(pp=2, dp=80))}  # fmt: skip
NESTED = {"vision": ("0-255", Layout(tp=2, dp=128)), "llm": ("0-255", Layout(tp=4, pp=4, dp=16)),
          "generator": ("128-255", Layout(dp=128))}  # fmt: skip
HALF = {"vision": ("0-63", Layout(dp=64)), "llm": ("0-127", Layout(dp=128)),
        "generator": ("0-127", Layout(tp=4, dp=32))}  # fmt: skip
IRREGULAR = {"vision": ("0-9,30-69,70-94", Layout(dp=75)), "llm": ("50-249", Layout(pp=2, dp=100)),
             "generator": ("0-199", Layout(dp=200))}  # fmt: skip


def _simulate_hundreds(modules: dict[str, tuple[str, Layout]]) -> tuple[Plan, Simulation]:
    plan = make_plan(modules, world_size=1000, global_batch_size=5 * modules["llm"][1].dp)
    return plan, simulate(plan, _gpu_model(1000))


@pytest.mark.parametrize(("modules", "num_classes"), [(APART, 7), (NESTED, 10), (HALF, 21)])
def test_hundreds_of_ranks_folded_are_hundreds_of_ranks(modules, num_classes):
    plan, simulation = _simulate_hundreds(modules)
    assert len(simulation.program.resources) <= num_classes
    assert by_rank(simulation, simulation.price.work.replicas) == _rank_by_rank(plan, simulation)


def test_slots_that_no_class_is_left_for_are_late_and_never_early():
    plan, simulation = _simulate_hundreds(IRREGULAR)
    found, expected = by_rank(simulation, simulation.price.work.replicas), _rank_by_rank(plan, simulation)
    assert len(simulation.program.resources) <= len(simulation.price.work.lanes) * MAX_CLASSES
    assert found.keys() == expected.keys()
    assert all(found[key][1] >= end_s for key, (_, end_s) in expected.items())
    last_s = max(end_s for _, end_s in expected.values())
    assert max(simulation.end_s) == pytest.approx(last_s, rel=0.02)


def _rank_by_rank(plan: Plan, simulation: Simulation) -> dict[tuple[int, Action], tuple[float, float]]:
    """Every slot of ranks by itself, in the schedule's order."""
    price, schedule = simulation.price, simulation.program.schedule
    number = {lane.name: i for i, lane in enumerate(price.work.lanes)}
    slots = {
        name: find_slots(plan, price.work.lanes[i].module, price.work.lanes[i].stage) for name, i in number.items()
    }
    meets: dict[tuple[str, str], dict[int, list[int]]] = {}
    for link in {(need.lane, action.lane) for action in schedule.order for need in schedule.needs(action)}:
        meets[link] = {}
        for i, j in find_hand_over(plan, *link):
            meets[link].setdefault(j, []).append(i)
    free = [0.0] * plan.world_size
    ends: dict[Action, list[float]] = {}
    times: dict[tuple[int, Action], tuple[float, float]] = {}
    for action in schedule.order:
        lane = number[action.lane]
        ends[action] = []
        for i, ranks in enumerate(slots[action.lane]):
            arrivals = [
                ends[need][j] + (price.transfer_s(number[need.lane], lane) if need.lane != action.lane else 0.0)
                for need in schedule.needs(action)
                for j in meets[need.lane, action.lane][i]
            ]
            start = max([free[rank] for rank in ranks] + arrivals)
            ends[action].append(start + price.costs[lane].seconds(action.kind))
            for rank in ranks:
                free[rank] = ends[action][i]
                times[rank, action] = start, ends[action][i]
    return times


@settings(max_examples=20)
@given(plans(world_size=4), st.randoms(use_true_random=False))
def test_lanes_in_another_order_are_the_same_lanes(plan, random):
    # A schedule file may list them as it likes
    schedule = build_schedule(plan, WORKLOAD)
    names = list(schedule.lanes)
    random.shuffle(names)
    work = replace(schedule.work, lanes={name: schedule.lanes[name] for name in names})
    model = _gpu_model()
    plain, shuffled = (simulate(plan, model, each) for each in (schedule, replace(schedule, work=work)))
    assert plain.end_s == shuffled.end_s
    assert plain.class_peak_bytes == shuffled.class_peak_bytes


def test_split_backwards_have_no_price_yet():
    plan = make_plan({"llm": ("0", Layout())}, workload=BACKBONE_ONLY, world_size=1, global_batch_size=2)
    graph = stage_graph(plan, BACKBONE_ONLY)
    kinds = [Kind.F, Kind.I, Kind.W]
    lane = tuple(Action("llm", 0, kind, unit) for unit in range(2) for kind in kinds)
    schedule = schedule_in_turns("split", graph, {"llm.0": lane})
    with pytest.raises(ScheduleError, match="split backwards have no price yet"):
        simulate(plan, CostModel(BACKBONE_ONLY, make_cluster(1)), schedule)


def test_a_program_is_kept_by_its_graph_and_not_by_its_ranks():
    few, many = (
        simulate(make_plan({"vision": (f"0-{n - 1}", Layout(dp=n)), "llm": (f"0-{n - 1}", Layout(tp=2, dp=n // 2)),
                            "generator": (f"0-{n - 1}", Layout(dp=n))}, world_size=n, global_batch_size=8 * n),
                 _gpu_model(n))
        for n in (4, 8)
    )  # fmt: skip
    assert few.program is many.program
    other = make_plan({"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(tp=2, dp=2)),
                       "generator": ("0-3", Layout(dp=4))}, global_batch_size=32)  # fmt: skip
    assert simulate(other, _gpu_model()).program is not few.program


def test_needs_of_other_lanes_are_kept_and_own_ones_dropped():
    plan = make_plan({"llm": ("0-1", Layout(pp=2))}, workload=BACKBONE_ONLY, world_size=2, global_batch_size=3)
    graph = stage_graph(plan, BACKBONE_ONLY)
    program = fold(
        build_schedule(plan, BACKBONE_ONLY), graph, SlotClasses.one_each([graph.occupies[lane] for lane in graph.lanes])
    )
    place = dict(zip(program.schedule.order, count(1)))
    needs = {str(action): program.need[at - 1] for action, at in place.items()}
    assert needs["llm.0F0"] == needs["llm.1B2"] == 0  # its own forward is all that llm.1B2 needs
    assert needs["llm.1F1"] == place[Action("llm", 0, Kind.F, 1)]
    assert needs["llm.0B1"] == place[Action("llm", 1, Kind.B, 1)]
    assert not any(program.more_needs)
    lags = [0.0] * len(program.links)
    ends = run_clock(program, [1.0 if kind is Kind.F else 2.0 for _, kind in program.jobs], lags, OwnDevices())[1]
    assert max(ends) == (2 - 1 + 3) * 3


def test_interleaved_chunks_travel_around_the_ring():
    deep = replace(BACKBONE_ONLY, modules=(replace(BACKBONE_ONLY.modules[0], num_layers=8),))
    plan = make_plan({"llm": ("0-1", Layout(pp=2, vpp=2))}, workload=deep, world_size=2, global_batch_size=4)
    model = CostModel(deep, make_cluster(2))
    simulation = simulate(replace(plan, schedule=ScheduleChoice("interleaved")), model)
    assert {(1, 0), (0, 1)} <= {*simulation.program.links}
    assert_as_in_the_oracle(simulation, plan)
    again = simulate_program(simulation.price, simulation.program)
    assert again.end_s == simulation.end_s
