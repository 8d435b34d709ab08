"""A schedule made ready for fast simulation: positions instead of names, ranks with the same lanes folded into one.

Ranks that run the same lanes do the same at the same time, so the cost of a simulation depends on the number of
lanes and microbatches and not on the number of ranks. Programs are kept, since a search meets the same ones again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import SCHEDULES, validate_schedule_name
from megatron_mosaic.schedules.passes import order_actions, rank_classes, stage_ranks
from megatron_mosaic.schedules.schedule import Action, Kind
from megatron_mosaic.schedules.stage_graph import StageGraph

Lane = tuple[str, int]  # (module, stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneMap:
    """Which lanes a plan has and which ranks they share. A class is named by its lowest rank."""

    graph: StageGraph
    lanes: tuple[Lane, ...]
    classes: tuple[frozenset[int], ...]  # by lane
    lanes_of_class: Mapping[int, tuple[int, ...]]  # class -> positions in `lanes`

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
    """Actions in the one global order of `merge_lanes`; everything else refers to positions in it."""

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
    graph = StageGraph.of(plan, workload, plan.num_microbatches(workload.backbone.name))
    lanes = tuple((module.name, s) for module in workload.modules for s in range(graph.num_stages[module.name]))
    by_name = rank_classes(plan)
    classes = tuple(by_name[f"{module}.{stage}"] for module, stage in lanes)
    names = sorted(frozenset().union(*classes))
    return LaneMap(
        graph=graph,
        lanes=lanes,
        classes=classes,
        lanes_of_class={name: tuple(i for i, members in enumerate(classes) if name in members) for name in names},
    )


def build_program(schedule: str, lane_map: LaneMap) -> Program:
    """The program of a training step. ScheduleError when the schedule is not built yet."""
    validate_schedule_name(schedule)
    names = {name: index for index, name in enumerate(lane_map.lanes_of_class)}
    graph = lane_map.graph
    return _build(
        schedule,
        lane_map.lanes,
        graph.edges,
        tuple(graph.units.items()),
        graph.num_microbatches,
        graph.has_backward,
        tuple(graph.num_chunks.items()),
        # classes 0, 1, ...: plans that differ only in the number of ranks share a program
        tuple(frozenset(names[name] for name in members) for members in lane_map.classes),
    )


@lru_cache(maxsize=512)
def _build(
    name: str,
    lanes: tuple[Lane, ...],
    edges: tuple[tuple[str, str], ...],
    units: tuple[tuple[str, int], ...],
    num_microbatches: int,
    has_backward: frozenset[str],
    chunks: tuple[tuple[str, int], ...],
    classes: tuple[frozenset[int], ...],
) -> Program:
    num_stages = {module: stage + 1 for module, stage in lanes}
    graph = StageGraph(
        num_stages=num_stages,
        edges=edges,
        units=dict(units),
        num_microbatches=num_microbatches,
        has_backward=has_backward,
        num_chunks=dict(chunks),
    )
    schedule = SCHEDULES[name](graph)
    order = order_actions(schedule, {f"{module}.{stage}": members for (module, stage), members in zip(lanes, classes)})
    position = {action: index for index, action in enumerate(order)}
    lane_index = {lane: index for index, lane in enumerate(lanes)}
    lane_of = tuple(lane_index[action.module, action.stage] for action in order)
    needs = tuple(tuple(position[need] for need in schedule.needs(action)) for action in order)
    links = {(lane_of[p], lane_of[q]) for p, row in enumerate(needs) for q in row if lane_of[p] != lane_of[q]}
    return Program(
        actions=order,
        lanes=lanes,
        lane_of=lane_of,
        backward=tuple(action.kind is not Kind.F for action in order),
        needs=needs,
        classes=classes,
        links=tuple(sorted(links)),
        live_units=_live_units(order, lane_of, classes, has_backward),
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
