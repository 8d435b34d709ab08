"""Orders and programs: the naive list scheduling; every rank's part of one order can be run to its end."""

from hypothesis import given

from megatron_mosaic.plan import Layout
from megatron_mosaic.schedules import Kind, build_schedule, stage_graph
from megatron_mosaic.schedules.passes import project, rank_programs, stage_ranks, take_turns
from megatron_mosaic.schedules.rank_classes import classes_of_lanes, rank_classes
from tests.cases import WORKLOAD, make_plan, plans
from tests.goldens import assert_golden


def merge_naively(schedule, occupies):
    """The oracle: at every step look at every lane, and take the one whose next action can start first (F 1, B 2)."""
    end, free = {}, dict.fromkeys((name for names in occupies.values() for name in names), 0)
    left = {lane: list(actions) for lane, actions in schedule.lanes.items()}
    while any(left.values()):
        candidates = [
            (max([end[n] for n in schedule.needs(a)] + [free[r] for r in occupies[lane]]), a.kind is Kind.F, i, a, lane)
            for i, (lane, (a, *_)) in enumerate((lane, actions) for lane, actions in left.items() if actions)
            if all(need in end for need in schedule.needs(a))
        ]
        start, _, _, action, lane = min(candidates)
        end[action] = start + (1 if action.kind is Kind.F else 2)
        for resource in occupies[lane]:
            free[resource] = end[action]
        left[lane].pop(0)
    return tuple(end)


@given(plans(world_size=8))
def test_take_turns_is_naive_list_scheduling(plan):
    schedule, occupies = build_schedule(plan, WORKLOAD), classes_of_lanes(rank_classes(plan))
    numbered = {lane: i for i, lane in enumerate(schedule.lanes)}  # ties go to the lane listed first
    assert [*numbered] == [*stage_graph(plan, WORKLOAD).lanes]
    expected = merge_naively(schedule, occupies)
    assert take_turns(schedule.work, occupies) == schedule.order == expected


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
    for rank, program in rank_programs(plan, schedule).items():
        lanes = [f"{m}.{s}" for m, s in _lanes(plan, rank)]
        assert sorted({a.lane for a in program}) == sorted(lanes)
        for lane in lanes:
            assert tuple(a for a in program if a.lane == lane) == schedule.lanes[lane]
        assert list(program) == [a for a in schedule.order if a.lane in lanes]
        assert program == project(schedule, lanes)


@given(plans(world_size=8))
def test_classes_are_ranks_with_the_same_lanes(plan):
    classes = rank_classes(plan)
    assert [each.ranks.first for each in classes] == sorted(each.ranks.first for each in classes)
    by_rank = {rank: each.lanes for each in classes for rank in each.ranks}
    assert len(by_rank) == sum(len(each.ranks) for each in classes)  # nobody is in two
    for rank in range(plan.world_size):
        assert by_rank.get(rank, ()) == tuple(f"{m}.{s}" for m, s in _lanes(plan, rank))
    assert len({each.lanes for each in classes}) == len(classes)


def test_a_hundred_thousand_ranks_are_few_classes():
    plan = make_plan(
        {"vision": ("0-51199", Layout(dp=51200)), "llm": ("0-102399", Layout(tp=8, pp=4, dp=3200))}, world_size=102400
    )
    assert [(str(each.ranks), each.lanes) for each in rank_classes(plan)] == [
        ("0-25599", ("vision.0", "llm.0")),
        ("25600-51199", ("vision.0", "llm.1")),
        ("51200-76799", ("llm.2",)),
        ("76800-102399", ("llm.3",)),
    ]


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
