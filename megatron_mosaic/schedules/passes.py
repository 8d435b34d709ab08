"""From lanes to one order, and from one order to programs.

Every rank runs its actions in the order of one global list, so collectives of different modules meet in the same
order everywhere and sends never block: no deadlock, whatever overlaps, as long as messages of different modules have
communicators of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from heapq import heappop, heappush

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.lane_work import LaneWork
from megatron_mosaic.schedules.pictures import render_deadlock
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph

_WEIGHT = {Kind.F: 1, Kind.B: 2, Kind.I: 1, Kind.W: 1}


def take_turns(work: LaneWork, occupies: Mapping[str, frozenset[Hashable]]) -> tuple[Action, ...]:
    """One order of all lanes: list scheduling in nominal time (F 1, B 2) where a rank runs one action at a time.

    Picks the action that can start first; on ties a backward before a forward, then the lane listed first.
    `occupies[lane]`: the classes of ranks that are busy while it runs. ScheduleError where lanes wait for each other.
    O(actions x log lanes): a heap of lanes by the start of their next action. A lane whose ranks were taken meanwhile
    is put back with its later start when it comes up; no start ever gets earlier.
    """
    numbers = work.numbers
    needs, actions, num_lanes = numbers.needs, numbers.actions, len(numbers.lanes)
    resources = {name: i for i, name in enumerate(dict.fromkeys(r for lane in work.lanes for r in occupies[lane]))}
    taken = [tuple(resources[name] for name in occupies[lane]) for lane in work.lanes]
    free = [0] * len(resources)
    end = [-1] * len(actions)  # -1: not in the order yet
    cursor, last = numbers.first[:-1], numbers.first[1:]
    ready_at = [0] * num_lanes
    sleepers: dict[int, list[int]] = {}  # action -> lanes that look again when it is done
    order: list[Action] = []
    heap: list[tuple[int, bool, int]] = []
    weights = _WEIGHT

    def look(lane: int) -> None:
        """Put the lane's next action on the heap, or to sleep until a need of it is done."""
        number = cursor[lane]
        at = 0
        for need in needs[number]:
            if end[need] < 0:
                sleepers.setdefault(need, []).append(lane)
                return
            if end[need] > at:
                at = end[need]
        ready_at[lane] = at
        for resource in taken[lane]:
            if free[resource] > at:
                at = free[resource]
        heappush(heap, (at, actions[number][2] is Kind.F, lane))

    for lane in range(num_lanes):
        if cursor[lane] < last[lane]:
            look(lane)
    while heap:
        start, is_forward, lane = heappop(heap)
        later = ready_at[lane]
        for resource in taken[lane]:
            if free[resource] > later:
                later = free[resource]
        if later > start:
            heappush(heap, (later, is_forward, lane))
            continue
        number = cursor[lane]
        action = actions[number]
        end[number] = done_at = start + (1 if is_forward else weights[action[2]])
        for resource in taken[lane]:
            free[resource] = done_at
        order.append(action)
        cursor[lane] = number + 1
        if cursor[lane] < last[lane]:
            look(lane)
        if number in sleepers:
            for sleeper in sleepers.pop(number):
                look(sleeper)
    if len(order) < len(actions):
        raise _deadlock(work, [now - first for now, first in zip(cursor, numbers.first)], order)
    return tuple(order)


def _deadlock(work: LaneWork, cursor: list[int], order: list[Action]) -> ScheduleError:
    picture = render_deadlock(work, dict(zip(work.lanes, cursor)), set(order))
    return ScheduleError("schedule: lanes", got=picture, expected="orders without a cycle", fix="reorder those lanes")


def schedule_in_turns(name: str, graph: StageGraph, lanes: Mapping[str, tuple[Action, ...]]) -> Schedule:
    """The schedule of these lanes where those that share ranks take turns. ScheduleError if they deadlock."""
    work = LaneWork(num_microbatches=graph.num_microbatches, edges=graph.edges, units=graph.units, lanes=lanes)
    return Schedule(name=name, work=work, order=take_turns(work, graph.occupies))


def schedule_in_order(name: str, graph: StageGraph, order: tuple[Action, ...]) -> Schedule:
    """The schedule of one total order: each lane's own is what of it runs there."""
    return Schedule(name=name, work=work_in_order(graph, order), order=order, tracks=graph.lane_tracks)


def work_in_order(graph: StageGraph, order: tuple[Action, ...]) -> LaneWork:
    """What every lane does in one total order."""
    lanes: dict[str, list[Action]] = {lane: [] for lane in graph.lanes}
    for action in order:
        lanes[action.lane].append(action)
    return LaneWork(
        num_microbatches=graph.num_microbatches,
        edges=graph.edges,
        units=graph.units,
        lanes={lane: tuple(actions) for lane, actions in lanes.items()},
    )


def stage_ranks(plan: Plan, module: str, stage: int) -> tuple[int, ...]:
    """Global ranks of one pipeline stage, one by one."""
    return plan.modules[module].stage_ranks(stage).ranks


def project(schedule: Schedule, lanes: Collection[str]) -> tuple[Action, ...]:
    """What these lanes do, in the schedule's order: the program of a rank that has them, or of one of its tracks."""
    wanted = {(module, int(stage)) for module, _, stage in (lane.rpartition(".") for lane in lanes)}
    return tuple([action for action in schedule.order if action[:2] in wanted])


def modules_by_track(track_of: Mapping[str, int], lanes: Collection[str]) -> dict[int, tuple[str, ...]]:
    """Track -> modules that a rank with these lanes runs on it. Lanes that `track_of` leaves out are on track 0."""
    found: dict[int, list[str]] = {}
    for lane in lanes:
        found.setdefault(track_of.get(lane, 0), []).append(lane.rpartition(".")[0])
    return {track: tuple(found[track]) for track in sorted(found)}


def rank_programs(plan: Plan, schedule: Schedule) -> dict[int, tuple[Action, ...]]:
    """Rank -> its actions in order. Ranks without a lane have an empty program; alike ranks share one."""
    programs: dict[int, tuple[Action, ...]] = dict.fromkeys(range(plan.world_size), ())
    for alike in rank_classes(plan):
        programs |= dict.fromkeys(alike.ranks, project(schedule, alike.lanes))
    return programs
