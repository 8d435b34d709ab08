"""A schedule made ready for the clock: numbers instead of names, ranks with the same lanes folded into one class.

Ranks that run the same lanes do the same at the same time, so a simulation costs as much as there are lanes and
microbatches, whatever the number of ranks. A lane occupies its classes, each on the lane's track: lanes of one track
of a class take turns, tracks run at the same time. Needs inside a lane are left out: its own order implies them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_mosaic.plan import ScheduleChoice
from megatron_mosaic.schedules import Kind, Schedule, build
from megatron_mosaic.schedules.actions import FREES
from megatron_mosaic.schedules.stage_graph import StageGraph

Need = tuple[int, int]  # (1 + position, number of the link that the result travels over); (0, 0): none


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """All actions in the schedule's order, as parallel tuples; lanes and classes by the numbers of the stage graph."""

    schedule: Schedule
    lane: tuple[int, ...]  # by position
    job: tuple[int, ...]  # by position, into `jobs`
    jobs: tuple[tuple[int, Kind], ...]  # (lane, kind): actions of one job take the same time
    need: tuple[int, ...]  # by position: 1 + position of an action of another lane; 0: none
    link: tuple[int, ...]  # by position, into `links`: the way of that need's result
    more_needs: tuple[tuple[Need, ...], ...]  # by position; mostly none
    links: tuple[tuple[int, int], ...]  # (lane needed, lane that needs); the first is no link
    resources: tuple[tuple[int, ...], ...]  # by lane, what it occupies: a track of a class
    num_resources: int
    last: tuple[int, ...]  # by lane, the position of its last action
    live_units: tuple[tuple[tuple[int, ...], ...], ...]  # by class, the combinations of live units of its lanes


@lru_cache(maxsize=512)
def planned_program(choice: ScheduleChoice, graph: StageGraph) -> Program:
    """The program of a schedule by name; kept, since a search meets the same graphs again."""
    return fold(build(choice, graph), graph)


def fold(schedule: Schedule, graph: StageGraph) -> Program:
    """The program of a schedule of this graph. The schedule's lanes may stand in another order than the graph's."""
    table, names = schedule.table, graph.lanes
    number = {name: i for i, name in enumerate(names)}
    renumber = [number[name] for name in table.lanes]
    lane = [renumber[i] for i in table.lane]
    positions: list[list[int]] = [[] for _ in names]
    for position, each in enumerate(lane):
        positions[each].append(position)
    jobs = [(i, kind) for i, found in enumerate(positions) for kind in sorted({table.kind[at] for at in found})]
    job: list[dict[Kind, int]] = [{} for _ in names]
    for j, (i, kind) in enumerate(jobs):
        job[i][kind] = j
    need, link, more, links = _needs_of_others(lane, table.needs)
    holds = [sorted((name, schedule.tracks[each]) for name in graph.occupies[each]) for each in names]
    resource = {each: i for i, each in enumerate(dict.fromkeys(each for held in holds for each in held))}
    lanes_of: dict[int, list[int]] = {}
    for i, held in enumerate(holds):
        for name, _ in held:
            lanes_of.setdefault(name, []).append(i)
    return Program(
        schedule=schedule,
        lane=tuple(lane),
        job=tuple([job[i][kind] for i, kind in zip(lane, table.kind)]),
        jobs=tuple(jobs),
        need=need,
        link=link,
        more_needs=more,
        links=links,
        resources=tuple(tuple(resource[each] for each in held) for held in holds),
        num_resources=len(resource),
        last=tuple(found[-1] for found in positions),
        live_units=tuple(
            _live_units(table.kind, [positions[i] for i in lanes]) for _, lanes in sorted(lanes_of.items())
        ),
    )


def _needs_of_others(
    lane: Sequence[int], needs: Iterable[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[Need, ...], ...], tuple[tuple[int, int], ...]]:
    """`need`, `link`, `more_needs` and `links` of a program."""
    links: dict[tuple[int, int], int] = {(-1, -1): 0}
    first, ways = list[int](), list[int]()
    more: list[tuple[Need, ...]] = []
    rest: tuple[Need, ...]
    for own, row in zip(lane, needs):
        one, way, rest = 0, 0, ()
        for at in row:
            if lane[at] != own:
                link = links.setdefault((lane[at], own), len(links))
                if one:
                    rest += ((1 + at, link),)
                else:
                    one, way = 1 + at, link
        first.append(one)
        ways.append(way)
        more.append(rest)
    return tuple(first), tuple(ways), tuple(more), tuple(links)


def _live_units(kinds: Sequence[Kind], lanes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Every combination of live units that a class with these lanes (positions of their actions) meets.

    A forward adds one, a backward frees it. In a lane without backwards nothing outlives its forward.
    """
    keeps = [any(kinds[at] in FREES for at in positions) for positions in lanes]
    live, seen = [0] * len(lanes), dict[tuple[int, ...], None]()
    for at, own in sorted([(at, i) for i, found in enumerate(lanes) for at in found]):
        kind = kinds[at]
        if kind is Kind.F:
            live[own] += 1
            seen[tuple(live)] = None
            live[own] -= not keeps[own]
        elif kind in FREES:
            live[own] -= 1
    return tuple(seen)
