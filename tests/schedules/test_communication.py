"""Messages as part of a schedule: where receives are posted nothing blocks, even if every posted transfer blocks."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Layout
from megatron_mosaic.schedules import SCHEDULES, build_forward_only, build_schedule, stage_graph
from megatron_mosaic.schedules.communication.rendezvous import validate_rendezvous
from megatron_mosaic.schedules.communication.transfers import (
    Slot,
    insert_transfers,
    list_transfers,
    programs_with_transfers,
)
from megatron_mosaic.schedules.passes import rank_programs
from megatron_mosaic.schedules.rank_classes import classes_of_lanes, rank_classes
from tests.cases import WORKLOAD, make_plan, plans
from tests.schedules.graphs import graphs

PIPELINE = make_plan({"vision": ("0-1", Layout(dp=2)), "llm": ("0-1", Layout(pp=2)), "generator": ("1", Layout())})


def post_late(program):
    """As an action that receives what it needs when it begins: nothing is posted before."""
    own = {slot.action.lane for slot in program if slot.action}
    sent = {slot.action: [t for t in slot.posts if t.source.lane in own] for slot in program}
    late = {t for slot in program for t in slot.posts if t.target.lane in own}
    needed = {slot.action: [t for t in late if t.target == slot.action] for slot in program if slot.action}
    actions = [slot.action for slot in program]
    after = {before: needed.get(action, []) for before, action in pairwise(actions)}
    return tuple(Slot(action, tuple(dict.fromkeys([*sent[action], *after.get(action, [])]))) for action in actions)


def post_at_once(program):
    """All receives at the start of the step."""
    own = {slot.action.lane for slot in program if slot.action}
    posts = [t for slot in program for t in slot.posts]
    received = [t for t in posts if t.source.lane not in own]
    rest = [Slot(slot.action, tuple(t for t in slot.posts if t not in received)) for slot in program[1:]]
    return (Slot(None, tuple(received)), *rest)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=30)
@given(data=st.data())
def test_no_builder_can_block(name, data):
    graph = data.draw(graphs(schedule=name))
    validate_rendezvous(programs_with_transfers(SCHEDULES[name].build(graph), graph.occupies))


@settings(max_examples=1000)
@given(plans(world_size=8))
def test_no_plan_of_a_thousand_can_block(plan):
    """Training and evaluation; every message is posted once on each side."""
    occupies = classes_of_lanes(rank_classes(plan))
    for schedule in (build_schedule(plan, WORKLOAD), build_forward_only(plan, WORKLOAD, 3)):
        programs = programs_with_transfers(schedule, occupies)
        validate_rendezvous(programs)
        transfers = list_transfers(schedule)
        for (alike, track), program in programs.items():
            own = {slot.action.lane for slot in program if slot.action}
            expected = [t for t in transfers if t.source.lane in own or t.target.lane in own]
            assert [t for slot in program for t in slot.posts] == expected, (alike, track)


@given(plans(world_size=4))
def test_programs_hold_the_actions_of_their_ranks(plan):
    schedule = build_schedule(plan, WORKLOAD)
    for rank, actions in rank_programs(plan, schedule).items():
        lanes = {action.lane for action in actions}
        program = insert_transfers(schedule, lanes)
        assert tuple(slot.action for slot in program) == (None, *actions)
        place = {action: i for i, action in enumerate(actions)}
        for i, slot in enumerate(program):
            assert all(place[t.source] == i - 1 for t in slot.posts if t.source.lane in lanes), rank
            assert all(place[t.target] >= i for t in slot.posts if t.target.lane in lanes), rank


@pytest.mark.parametrize("spoil", [post_late, post_at_once])
def test_receives_posted_elsewhere_block(spoil):
    """1F1B: stage 0 sends its second forward when stage 1 sends its first gradient."""
    schedule = build_schedule(PIPELINE, WORKLOAD)
    programs = programs_with_transfers(schedule, stage_graph(PIPELINE, WORKLOAD).occupies)
    validate_rendezvous(programs)
    with pytest.raises(ScheduleError) as caught:
        validate_rendezvous({process: spoil(program) for process, program in programs.items()})
    picture = caught.value.got
    assert "class 0 (llm.0, vision.0) |" in picture
    assert "class 1 (generator.0, llm.1, vision.0) |" in picture
    assert (">start<" if spoil is post_at_once else "llm.0B1<") in picture


def test_a_rank_that_leaves_a_message_out_blocks_the_others():
    schedule = build_schedule(PIPELINE, WORKLOAD)
    programs = programs_with_transfers(schedule, stage_graph(PIPELINE, WORKLOAD).occupies)
    process = next(each for each, program in programs.items() if any(s.action and s.action.stage for s in program))
    lost = next(t for t in list_transfers(schedule) if str(t) == "llm.0F3>llm.1F3")
    programs[process] = tuple(Slot(s.action, tuple(t for t in s.posts if t != lost)) for s in programs[process])
    with pytest.raises(ScheduleError, match=r"both sides have posted llm\.0F3>llm\.1F3"):
        validate_rendezvous(programs)
