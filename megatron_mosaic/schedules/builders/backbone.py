"""The backbone's own pipeline in nominal time (F 1, B 2), alone: the clock by which others are nested around it.

llm.0 | F0 F1 F2 F3 B0 B0 ...        time 0  1  2  3  4 ...
llm.1 |    F0 F1 F2 B0 B0 ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.builders.interleaved import interleave
from megatron_mosaic.schedules.builders.one_f_one_b import alternate
from megatron_mosaic.schedules.lane_work import LaneWork
from megatron_mosaic.schedules.stage_graph import StageGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneClock:
    """When each action of the backbone would run, if every stage had its ranks for itself. `last`: the stage and chunk
    that a microbatch leaves last."""

    module: str
    last: tuple[int, int]
    start: Mapping[Action, int]
    end: Mapping[Action, int]

    def enters_first_stage(self, microbatch: int) -> int:
        return self.start[Action(self.module, 0, Kind.F, microbatch)]

    def left_last_stage(self, microbatch: int) -> int:
        return self.end[Action(self.module, self.last[0], Kind.F, microbatch, self.last[1])]

    def left_first_stage(self, microbatch: int) -> int:
        """The last gradient of a microbatch is there."""
        return self.end[Action(self.module, 0, Kind.B, microbatch)]

    @property
    def actions(self) -> tuple[Action, ...]:
        """In the order of their starts; the earlier stage first."""
        return tuple(sorted(self.start, key=lambda action: (self.start[action], action.stage)))


def run_backbone(graph: StageGraph, beside: frozenset[str] = frozenset()) -> BackboneClock:
    """1F1B (interleaved where it has virtual stages), with as many forwards more before the first backward as the
    modules behind it ask for: a backward waits for the last microbatch of every unit that its own is part of.

    Behind modules that run `beside` the backbone it goes on with the forwards of a unit more before it wants gradients.
    """
    waits = _last_forwards(graph, beside)
    least = max([forward.unit - backward.unit for backward, forward in waits.items()], default=0)
    longest = graph.num_microbatches * graph.chunks(graph.backbone)
    for extra in range(least, longest + 1):
        clock = _run(graph, _lanes(graph, extra), waits)
        if clock is not None:
            return clock
    raise ScheduleError(
        "schedule", got="a backbone whose stages wait for each other", expected="an order", fix="report this plan"
    )


def _lanes(graph: StageGraph, extra: int) -> dict[str, tuple[Action, ...]]:
    module, chunks = graph.backbone, graph.chunks(graph.backbone)
    num_stages, num_units, trained = graph.num_stages[module], graph.num_microbatches, module in graph.has_backward
    lanes = {}
    for stage in range(num_stages):
        if chunks > 1:
            lanes[f"{module}.{stage}"] = interleave(graph, module, stage, num_stages - 1 - stage + extra)
            continue
        forwards = [Action(module, stage, Kind.F, unit) for unit in range(num_units)]
        backwards = [Action(module, stage, Kind.B, unit) for unit in range(num_units) if trained]
        lanes[f"{module}.{stage}"] = alternate(forwards, backwards, num_stages - 1 - stage + extra)
    return lanes


def _run(
    graph: StageGraph, lanes: dict[str, tuple[Action, ...]], waits: Mapping[Action, Action]
) -> BackboneClock | None:
    """Times of these lanes, where a backward waits for the forward in `waits` too; None if they wait for each other."""
    work = LaneWork(num_microbatches=graph.num_microbatches, edges=(), units={graph.backbone: 1}, lanes=lanes)
    numbers = work.numbers
    start, end = [0] * len(numbers.actions), [-1] * len(numbers.actions)
    cursor, last = numbers.first[:-1], numbers.first[1:]
    free = [0] * len(lanes)
    sleepers: dict[int, list[int]] = {}
    awake = [*range(len(lanes))]
    while awake:
        lane = awake.pop()
        while cursor[lane] < last[lane]:
            number = cursor[lane]
            action = numbers.actions[number]
            needs = numbers.needs[number]
            if action in waits:
                needs = (*needs, numbers.number_of[waits[action]])
            if missing := [need for need in needs if end[need] < 0]:
                sleepers.setdefault(missing[0], []).append(lane)
                break
            start[number] = max([free[lane], *[end[need] for need in needs]])
            end[number] = free[lane] = start[number] + (1 if action.kind is Kind.F else 2)
            cursor[lane] += 1
            awake += sleepers.pop(number, ())
    if -1 in end:
        return None
    return BackboneClock(
        module=graph.backbone,
        last=(graph.num_stages[graph.backbone] - 1, graph.chunks(graph.backbone) - 1),
        start=dict(zip(numbers.actions, start)),
        end=dict(zip(numbers.actions, end)),
    )


def _last_forwards(graph: StageGraph, beside: frozenset[str]) -> dict[Action, Action]:
    """Backward of the last virtual stage -> the forward there that it waits for, of another microbatch of a unit."""
    module = graph.backbone
    stage, chunk = graph.num_stages[module] - 1, graph.chunks(module) - 1
    found = {}
    for m in range(graph.num_microbatches if module in graph.has_backward else 0):
        last = _last_before_return(graph, module, range(m, m + 1), beside)
        found[Action(module, stage, Kind.B, m, chunk)] = Action(module, stage, Kind.F, last, chunk)
    return found


def _last_before_return(graph: StageGraph, module: str, covered: range, beside: frozenset[str]) -> int:
    """The last microbatch that must have left the backbone before gradients of these can come back to the module."""
    found = covered[-1]
    for target in graph.consumers(module):
        if target in graph.has_backward:
            for unit in graph.units_covering(target, covered):
                again = _last_before_return(graph, target, graph.microbatches_of(target, unit), beside)
                found = max(found, again, _last_before_forward(graph, target, unit))
                if target in beside and unit + 1 < graph.num_units(target):
                    found = max(found, graph.microbatches_of(target, unit + 1)[-1])
    return found


def _last_before_forward(graph: StageGraph, module: str, unit: int) -> int:
    """The last microbatch that must have left the backbone before a generator's unit can run."""
    covered = graph.microbatches_of(module, unit)
    found = covered[-1]
    for source, target in graph.edges:
        if target == module and graph.reaches(graph.backbone, source):
            found = max(
                [found] + [_last_before_forward(graph, source, u) for u in graph.units_covering(source, covered)]
            )
    return found
