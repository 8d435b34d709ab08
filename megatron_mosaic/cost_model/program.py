"""A schedule made ready for fast simulation: positions instead of names, ranks with the same lanes folded into one.

Ranks that run the same lanes do the same at the same time, so the cost of a simulation depends on the number of
lanes and microbatches and not on the number of ranks. Programs are kept, since a search meets the same ones again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Plan, ScheduleChoice
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Action, Kind, Schedule, build, stage_graph
from megatron_mosaic.schedules.passes import stage_ranks
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.stage_graph import StageGraph

Lane = tuple[str, int]  # (module, stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneMap:
    """Which lanes a plan has and which ranks they share."""

    graph: StageGraph
    lanes: tuple[Lane, ...]
    classes: tuple[frozenset[int], ...]  # by lane, numbers
    lanes_of_class: Mapping[int, tuple[int, ...]]  # lowest rank of each class -> positions in `lanes`

    def __post_init__(self) -> None:
        object.__setattr__(self, "lanes_of_class", FrozenMap(self.lanes_of_class))

    def class_of_rank(self, plan: Plan) -> dict[int, int]:
        """Rank -> position of its class, for ranks that have a lane."""
        position = {lanes: index for index, lanes in enumerate(self.lanes_of_class.values())}
        lanes_of: dict[int, list[int]] = {}
        for lane, (module, stage) in enumerate(self.lanes):
            for rank in stage_ranks(plan, module, stage):
                lanes_of.setdefault(rank, []).append(lane)
        return {rank: position[tuple(lanes)] for rank, lanes in sorted(lanes_of.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Actions in the schedule's order; everything else refers to positions in it."""

    actions: tuple[Action, ...]
    lanes: tuple[Lane, ...]
    lane_of: tuple[int, ...]  # position -> lane
    backward: tuple[bool, ...]
    needs: tuple[tuple[int, ...], ...]  # position -> positions
    classes: tuple[frozenset[int], ...]  # lane -> classes of ranks
    links: tuple[tuple[int, int], ...]  # (lane that needs, lane that is needed), of different lanes
    live_units: tuple[tuple[tuple[int, ...], ...], ...]  # class -> distinct counts of live units per lane


def map_lanes(plan: Plan, workload: Workload) -> LaneMap:
    """Lanes of the plan's training step, and the classes of ranks they run on."""
    graph, alike = stage_graph(plan, workload), rank_classes(plan)
    lanes = tuple((module, stage) for module, count in graph.num_stages.items() for stage in range(count))
    return LaneMap(
        graph=graph,
        lanes=lanes,
        classes=tuple(graph.occupies[f"{module}.{stage}"] for module, stage in lanes),
        lanes_of_class={
            each.ranks.first: tuple(i for i, (m, s) in enumerate(lanes) if f"{m}.{s}" in each.lanes) for each in alike
        },
    )


@lru_cache(maxsize=512)
def planned_program(choice: ScheduleChoice, lane_map: LaneMap) -> Program:
    """The program of the schedule that a plan names. ScheduleError when it is not built yet."""
    return build_program(build(choice, lane_map.graph), lane_map)


def build_program(built: Schedule, lane_map: LaneMap) -> Program:
    """The program of a training step. Its lanes may stand in another order than the plan's."""
    table = built.table
    number = {f"{module}.{stage}": i for i, (module, stage) in enumerate(lane_map.lanes)}
    lane_of = tuple([number[table.lanes[lane]] for lane in table.lane])
    links = {(lane_of[p], lane_of[q]) for p, row in enumerate(table.needs) for q in row}
    return Program(
        actions=built.order,
        lanes=lane_map.lanes,
        lane_of=lane_of,
        backward=tuple(kind is not Kind.F for kind in table.kind),
        needs=table.needs,
        classes=lane_map.classes,
        links=tuple(sorted((a, b) for a, b in links if a != b)),
        live_units=_live_units(built.order, lane_of, lane_map.classes, lane_map.graph.has_backward),
    )


def _live_units(
    order: tuple[Action, ...],
    lane_of: tuple[int, ...],
    classes: tuple[frozenset[int], ...],
    has_backward: frozenset[str],
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Per class, every combination of live units per lane that it meets: a forward adds one, a backward frees it.

    Without a backward (a frozen module) nothing outlives its forward.
    """
    seen: list[dict[tuple[int, ...], None]] = [{} for _ in frozenset().union(*classes)]
    for name, combinations in enumerate(seen):
        live = [0] * len(classes)
        for action, lane in zip(order, lane_of):
            if name in classes[lane]:
                before = live[lane]
                live[lane] += 1 if action.kind is Kind.F else -1
                if live[lane] > before:
                    combinations[tuple(live)] = None
                    live[lane] -= action.module not in has_backward
    return tuple(tuple(combinations) for combinations in seen)
