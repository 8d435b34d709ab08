"""A schedule made ready for the clock: numbers instead of names, and a row for each class of alike dp slots.

The order has one entry for all replicas of a lane; replicas have no barrier, so each class of slots runs an entry by
itself (`replicas.py`). Most often all slots of a lane are alike, and a simulation costs as much as there are lanes and
microbatches, whatever the number of ranks. A slot occupies its ranks, on the lane's track: lanes of one track of a rank
take turns, tracks run at the same time. Needs inside a lane are left out: its own order implies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megatron_mosaic.cost_model.clock.replicas import SlotClasses, part_of_unit
from megatron_mosaic.plan import ScheduleChoice
from megatron_mosaic.schedules import Kind, Schedule, build
from megatron_mosaic.schedules.actions import FREES
from megatron_mosaic.schedules.stage_graph import StageGraph

Need = tuple[int, int]  # (1 + row, number of the link that the result travels over); (0, 0): none


@dataclass(frozen=True, slots=True)
class LiveUnits:
    """Of the lanes of one track, every combination of live units that a rank meets; a count for each lane."""

    lanes: tuple[int, ...]
    combinations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """All actions in the schedule's order, each once for every class of its lane's slots: parallel tuples, by row."""

    schedule: Schedule
    entry: Sequence[int]  # by row, its position in the schedule's order
    slots: tuple[int, ...]  # by row, a slot class
    job: tuple[int, ...]  # by row, into `jobs`
    jobs: tuple[tuple[int, Kind], ...]  # (lane, kind): actions of one job take the same time
    need: tuple[int, ...]  # by row: 1 + row of an action of another lane; 0: none
    link: tuple[int, ...]  # by row, into `links`: the way of that need's result
    more_needs: tuple[tuple[Need, ...], ...]  # by row; mostly none
    links: tuple[tuple[int, int], ...]  # (lane needed, lane that needs); the first is no link
    lane_of: tuple[int, ...]  # by slot class
    resources: tuple[tuple[int, ...], ...]  # by slot class, what it occupies: a track of a kind of ranks
    num_resources: int
    beside: tuple[tuple[int, ...], ...]  # by slot class, those of its kinds of ranks that have several tracks
    last: tuple[tuple[int, ...], ...]  # by lane, the rows of its last action
    live_units: tuple[tuple[LiveUnits, ...], ...]  # by class of ranks, of each of its tracks


@lru_cache(maxsize=512)
def planned_program(choice: ScheduleChoice, graph: StageGraph, classes: SlotClasses) -> Program:
    """The program of a schedule by name; kept, since a search meets the same graphs again."""
    return fold(build(choice, graph), graph, classes)


def fold(schedule: Schedule, graph: StageGraph, classes: SlotClasses) -> Program:
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
    rows = _Rows(
        entry=range(len(lane)),
        slots=tuple(lane),
        job=tuple([job[i][kind] for i, kind in zip(lane, table.kind)]),
        need=need,
        link=link,
        more_needs=more,
        last=tuple((found[-1],) for found in positions),
    )
    if classes.first[-1] > len(names):
        covered = [graph.microbatches_of(action.module, action.unit) for action in schedule.order]
        rows = _spread(rows, links, classes, covered)
    lane_of = tuple(i for i in range(len(names)) for _ in range(classes.first[i], classes.first[i + 1]))
    holds = [[(kind, schedule.tracks[names[i]]) for kind in kinds] for i, kinds in zip(lane_of, classes.occupies)]
    resource = {each: i for i, each in enumerate(dict.fromkeys(each for held in holds for each in held))}
    num_tracks = Counter(kind for kind, _ in resource)
    return Program(
        schedule=schedule,
        entry=rows.entry,
        slots=rows.slots,
        job=rows.job,
        jobs=tuple(jobs),
        need=rows.need,
        link=rows.link,
        more_needs=rows.more_needs,
        links=links,
        lane_of=lane_of,
        resources=tuple(tuple(resource[each] for each in held) for held in holds),
        num_resources=len(resource),
        beside=tuple(tuple(kind for kind, _ in held if num_tracks[kind] > 1) for held in holds),
        last=rows.last,
        live_units=_live_units_of_classes(graph, table.kind, positions, [schedule.tracks[name] for name in names]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The columns of a program."""

    entry: Sequence[int]
    slots: tuple[int, ...]
    job: tuple[int, ...]
    need: tuple[int, ...]
    link: tuple[int, ...]
    more_needs: tuple[tuple[Need, ...], ...]
    last: tuple[tuple[int, ...], ...]


def _spread(rows: _Rows, links: Sequence[tuple[int, int]], classes: SlotClasses, covered: Sequence[range]) -> _Rows:
    """A row for every slot class of an action's lane, with needs of the slots that it takes something from. `covered`:
    the microbatches of each action."""
    sizes = [after - first for first, after in zip(classes.first, classes.first[1:])]
    base = [0, *accumulate(sizes[lane] for lane in rows.slots)]  # by position, its first row
    ways = [_way(link, sizes, classes) for link in links]
    shares = _Shares(links, sizes, classes, covered)
    entry, slots, job, firsts, ways_of_first, more = [], [], [], [], [], []
    for at, (lane, its_job, need, link, others) in enumerate(
        zip(rows.slots, rows.job, rows.need, rows.link, rows.more_needs)
    ):
        needed = ((need, link), *others) if need else ()
        for k in range(sizes[lane]):
            found = [
                (1 + base[other - 1] + offset, way)
                for other, way in needed
                for offset in ways[way][k]
                if shares(way, at, k, other - 1, offset)
            ]
            first, *rest = found or [(0, 0)]
            entry.append(at)
            slots.append(classes.first[lane] + k)
            job.append(its_job)
            firsts.append(first[0])
            ways_of_first.append(first[1])
            more.append(tuple(rest))
    return _Rows(
        entry=tuple(entry),
        slots=tuple(slots),
        job=tuple(job),
        need=tuple(firsts),
        link=tuple(ways_of_first),
        more_needs=tuple(more),
        last=tuple(tuple(range(base[at], base[at + 1])) for (at,) in rows.last),
    )


class _Shares:
    """Whether slots of the two ends of a need have items of the same microbatches."""

    def __init__(
        self, links: Sequence[tuple[int, int]], sizes: Sequence[int], classes: SlotClasses, covered: Sequence[range]
    ) -> None:
        self._parts = [classes.parts.get(link, ()) for link in links]
        self._has_target_parts = [sizes[target] > 1 for _, target in links]
        self._covered = covered

    def __call__(self, way: int, at: int, own: int, need: int, other: int) -> bool:
        """Of the class `own` of the action at a position, and the class `other` of what it needs; classes counted from
        their lanes' first."""
        if not self._parts[way]:
            return True
        if self._has_target_parts[way]:
            unit, microbatch, part = self._covered[at], self._covered[need], self._parts[way][own]
        else:
            unit, microbatch, part = self._covered[need], self._covered[at], self._parts[way][other]
        return microbatch[0] - unit[0] in part_of_unit(part, len(unit))


def _way(link: tuple[int, int], sizes: Sequence[int], classes: SlotClasses) -> tuple[tuple[int, ...], ...]:
    """By slot class of the lane that needs, the classes that it needs, counted from their lane's first."""
    source, target = link
    if link not in classes.feeds:
        return ((0,),) * sizes[target]
    return tuple(tuple(each - classes.first[source] for each in needed) for needed in classes.feeds[link])


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


def _live_units_of_classes(
    graph: StageGraph, kinds: Sequence[Kind], positions: Sequence[Sequence[int]], tracks: Sequence[int]
) -> tuple[tuple[LiveUnits, ...], ...]:
    """By class of ranks with the same lanes, and by track; whenever their slots run, each track keeps to the order."""
    lanes_of: dict[int, dict[int, list[int]]] = {}
    for i, lane in enumerate(graph.lanes):
        for name in graph.occupies[lane]:
            lanes_of.setdefault(name, {}).setdefault(tracks[i], []).append(i)
    return tuple(
        tuple(LiveUnits(tuple(lanes), _live_units(kinds, [positions[i] for i in lanes])) for lanes in found.values())
        for _, found in sorted(lanes_of.items())
    )


def _live_units(kinds: Sequence[Kind], lanes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Every combination of live units that a track with these lanes (positions of their actions) meets.

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
