"""Rank programs: every rank's part of one order, which can always be run to its end."""

from hypothesis import given

from megatron_mosaic.plan import Layout
from megatron_mosaic.schedules import build_schedule
from megatron_mosaic.schedules.passes import merge_lanes, rank_classes, rank_programs, stage_ranks
from tests.cases import WORKLOAD, make_plan, plans
from tests.goldens import assert_golden


def _run_to_the_end(plan, schedule, programs):
    """Ranks meet in actions: an action runs when it is next on all ranks of its stage and its needs are done."""
    cursor = dict.fromkeys(programs, 0)
    done = set()
    progress = True
    while progress:
        progress = False
        for program in programs.values():
            for action in program:
                if action in done:
                    continue
                ranks = stage_ranks(plan, action.module, action.stage)
                heads = {programs[r][cursor[r]] if cursor[r] < len(programs[r]) else None for r in ranks}
                if heads == {action} and all(need in done for need in schedule.needs(action)):
                    done.add(action)
                    for rank in ranks:
                        cursor[rank] += 1
                    progress = True
                break
    return done, cursor


@given(plans(world_size=8))
def test_programs_never_deadlock(plan):
    schedule = build_schedule(plan, WORKLOAD)
    programs = rank_programs(plan, schedule)
    done, cursor = _run_to_the_end(plan, schedule, programs)
    assert len(done) == sum(map(len, schedule.lanes.values()))
    assert cursor == {rank: len(program) for rank, program in programs.items()}


@given(plans(world_size=8))
def test_programs_hold_each_lane_in_its_order(plan):
    schedule = build_schedule(plan, WORKLOAD)
    order = merge_lanes(plan, schedule)
    for rank, program in rank_programs(plan, schedule).items():
        lanes = [
            f"{m}.{s}"
            for m in plan.modules
            for s in range(plan.modules[m].layout.pp)
            if rank in stage_ranks(plan, m, s)
        ]
        assert sorted({a.lane for a in program}) == sorted(lanes)
        for lane in lanes:
            assert tuple(a for a in program if a.lane == lane) == schedule.lanes[lane]
        assert list(program) == [a for a in order if a.lane in lanes]


@given(plans(world_size=8))
def test_classes_are_ranks_with_the_same_lanes(plan):
    classes = rank_classes(plan)
    for lane, members in classes.items():
        module, _, stage = lane.rpartition(".")
        ranks = stage_ranks(plan, module, int(stage))
        assert members <= set(ranks)
        assert all(any(_lanes(plan, rank) == _lanes(plan, name) for name in members) for rank in ranks)
    names = sorted(set().union(*classes.values()))
    assert len({_lanes(plan, name) for name in names}) == len(names)


def _lanes(plan, rank):
    return tuple(
        (m, s) for m, placed in plan.modules.items() for s in range(placed.layout.pp) if rank in stage_ranks(plan, m, s)
    )


def test_stage_ranks_take_pp_as_the_slowest_axis():
    plan = make_plan({"llm": ("0-1,4,6", Layout(pp=2, dp=2))}, world_size=8)
    assert [stage_ranks(plan, "llm", s) for s in (0, 1)] == [(0, 1), (4, 6)]


def test_program_golden():
    plan = make_plan(
        {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("2-3", Layout(dp=2))},
        global_batch_size=8,
    )
    programs = rank_programs(plan, build_schedule(plan, WORKLOAD))
    assert_golden("programs", "".join(f"rank {r}: {' '.join(map(str, p))}\n" for r, p in programs.items()))


@given(plans(world_size=8))
def test_messages_of_a_module_and_direction_are_sent_and_received_in_one_order(plan):
    """Two ranks see messages in the order they were sent, per communicator; one communicator per module and direction
    (`Grids.pipeline_group`) is enough exactly if sender and receiver agree on that order."""
    schedule = build_schedule(plan, WORKLOAD)
    programs = rank_programs(plan, schedule)
    for module, placed in plan.modules.items():
        for stage in range(placed.layout.pp - 1):
            pairs = zip(stage_ranks(plan, module, stage), stage_ranks(plan, module, stage + 1))
            for before, after in pairs:
                for kind in "FB":
                    orders = [
                        [a.unit for a in programs[rank] if (a.module, a.stage, a.kind) == (module, at, kind)]
                        for rank, at in ((before, stage), (after, stage + 1))
                    ]
                    assert orders[0] == orders[1]
