"""Encoder work in the backbone's bubbles (as Optimus does, arXiv 2408.03505), the rest nested around it.

    llm.0    | F0 F1 F2 F3 .  .  .  B0 F4 ...              stage 0 is idle until its first gradient comes,
    llm.1    | .  F0 F1 F2 .  B0 F3 B1 ...                 stage 1 before its first forward, too:
    vision.0 | F0 ... F1 in both, before the unit is wanted; and backwards of the last units between the last ones

A forward is laid into bubbles that every rank has before the unit is wanted, so more units are alive than under
`nested`: 1 + as many as fit, whatever the batch. Backwards of the last ones fill the bubbles in which the pipeline
drains. A virtual stage of an encoder is laid by itself: where a bubble is too short, give the encoder vpp.

Nominal time: a unit of an encoder takes as long as a microbatch on one stage of the backbone (F 1, B 2), its virtual
stages shares of that. How many units run ahead is tried; the shortest step wins, then the fewest units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add

from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.builders.backbone import run_backbone
from megatron_mosaic.schedules.builders.cuts import (
    Cuts,
    backwards,
    encoder_forwards,
    generator_forwards,
    lay_in_order,
    list_pieces,
)
from megatron_mosaic.schedules.builders.windows import Cut, Windows
from megatron_mosaic.schedules.lane_work import LaneWork
from megatron_mosaic.schedules.passes import schedule_in_order, work_in_order
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph

_SLACK = 1  # as in nested
Needs = Mapping[Action, tuple[Action, ...]]  # what has to be done before an action


def bubble_fill(graph: StageGraph) -> Schedule:
    """Encoders in bubbles of the ranks that they share with the backbone; elsewhere, and behind it, as `nested`."""
    clock = run_backbone(graph)
    others = generator_forwards(graph, clock)
    returned = backwards(graph, clock, others)
    found: list[tuple[int, tuple[Action, ...]]] = []
    tried: list[Cuts] = []
    for more in range(graph.num_stages[graph.backbone] + 1):
        encoders = encoder_forwards(graph, clock, others, returned, partial(add, _SLACK + more))
        if encoders.forwards in tried:  # all units run ahead by now
            continue
        tried.append(encoders.forwards)
        forwards = encoders.forwards | others
        order = lay_in_order(graph, clock, forwards, returned)
        work = work_in_order(graph, order)
        if not found:  # whatever the bubbles are, no worse than that
            needs = {action: work.needs(action) for action in order}  # of all that follow: they differ in order alone
            windows = Windows(clock, work, nominal_scale(graph))
            found.append((_nominal_length(graph, needs, order), order))
        pieces = [(key[0], action) for key, action in sorted(list_pieces(graph, forwards, returned))]
        for fills_end in (False, True):
            order = _Filling(graph, windows, work, needs, pieces, fills_end).order()
            found.append((_nominal_length(graph, needs, order), order))
    best = min(found, key=lambda pair: pair[0])[1]  # of equals the first: it holds the fewest units
    return schedule_in_order("bubble_fill", graph, best)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """An action of another module, the time of its cut in `nested`, and the bounds of its cut: behind what it needs of
    the backbone, before what needs it there."""

    action: Action
    time: int
    duration: int
    stages: tuple[int, ...]  # of the backbone that run where this does
    least: Cut
    farthest: Cut
    may_fill: bool  # a forward that no backward has to make room for, a backward for whose room no forward waits


class _Filling:
    """Walks through the pieces in their order under `nested`; before each it lays those forwards that fit by now. Cuts
    never shrink, and none goes so far that a piece that is left could not keep its bound. `_cut` is the last one."""

    def __init__(
        self,
        graph: StageGraph,
        windows: Windows,
        work: LaneWork,
        needs: Needs,
        pieces: Sequence[tuple[int, Action]],
        fills_end: bool,
    ) -> None:
        """`work`: of the lanes under `nested`. What an earlier one took of the windows is given back."""
        self._graph, self._work, self._needs, self._fills_end = graph, work, needs, fills_end
        self._scale = nominal_scale(graph)
        self._windows = windows
        self._windows.clear()
        self._held = {module: _units_ahead(work, module) for module in graph.num_stages}
        self._waiting: dict[Action, list[Action]] = {}  # action of another module -> those of the backbone that need it
        for action, needed in needs.items():
            for need in needed if action.module == graph.backbone else ():
                if need.module != graph.backbone:
                    self._waiting.setdefault(need, []).append(action)
        self._pieces = [self._describe(time, action) for time, action in pieces]
        self._early = [piece for piece in self._pieces if piece.may_fill and piece.action.kind is Kind.F]
        self._limits = [self._windows.everything]
        for piece in reversed(self._pieces):
            self._limits.append(_each_least(self._limits[-1], piece.farthest))
        self._limits.reverse()
        self._cut = self._windows.nothing
        self._laid: dict[Action, None] = {}  # in order, without the backbone
        self._order: list[Action] = []

    def order(self) -> tuple[Action, ...]:
        """All actions."""
        for at, piece in enumerate(self._pieces):
            while self._lay_early(at):
                pass
            if piece.action in self._laid:
                continue
            moment = self._windows.at(self._scale * piece.time)
            found = self._fit(piece, self._limits[at]) if piece.may_fill and piece.action.kind is not Kind.F else None
            self._lay(piece, found or _each_most(self._cut, piece.least, moment))
        self._order.extend(self._windows.between(self._cut, self._windows.everything))
        return tuple(self._order)

    def _lay_early(self, at: int) -> bool:
        """Lay the first forward that is ready and fits before piece number `at`; whether there is one."""
        lanes: set[str] = set()
        for piece in self._early:
            action = piece.action
            if action in self._laid or action.lane in lanes:
                continue
            lanes.add(action.lane)  # its lane goes on with nothing else
            before = [need for need in self._needs[action] if need.module != self._graph.backbone]
            own = self._work.lanes[action.lane]
            place = own.index(action)
            if all(need in self._laid for need in (*before, *own[:place])):
                found = self._fit(piece, _each_least(self._limits[at], piece.farthest))
                if found is not None:
                    self._lay(piece, found)
                    return True
        return False

    def _fit(self, piece: _Piece, limit: Cut) -> Cut | None:
        """The least cut at which the piece fits into bubbles; they are taken."""
        found = self._windows.fit(piece.duration, piece.stages, _each_most(self._cut, piece.least), limit)
        if found is not None:
            self._windows.take(piece.duration, piece.stages, found)
        return found

    def _lay(self, piece: _Piece, cut: Cut) -> None:
        self._order.extend([*self._windows.between(self._cut, cut), piece.action])
        self._laid[piece.action] = None
        self._cut = cut

    def _describe(self, time: int, action: Action) -> _Piece:
        graph, module, backbone = self._graph, action.module, self._graph.backbone
        ours = graph.occupies[action.lane]
        stages = [
            s for s in range(graph.num_stages[backbone]) if not ours.isdisjoint(graph.occupies[f"{backbone}.{s}"])
        ]
        is_free = (
            0 < action.unit < self._held[module]
            if action.kind is Kind.F
            else self._fills_end and action.unit >= graph.num_units(module) - self._held[module]
        )
        return _Piece(
            action=action,
            time=time,
            duration=nominal_duration(graph, action, self._scale),
            stages=tuple(stages),
            least=self._windows.after([need for need in self._needs[action] if need.module == backbone]),
            farthest=self._windows.before(self._waiting.get(action, ())),
            may_fill=bool(stages) and graph.reaches(module, backbone) and is_free,
        )


def nominal_scale(graph: StageGraph) -> int:
    """Parts of a nominal second, so that every virtual stage of an encoder takes a whole number of them."""
    return math.lcm(*map(graph.chunks, graph.num_stages))


def nominal_duration(graph: StageGraph, action: Action, scale: int) -> int:
    """F 1, B 2 of the backbone; of another module its virtual stages together."""
    whole = scale * (1 if action.kind is Kind.F else 2)
    return whole if action.module == graph.backbone else whole // graph.chunks(action.module)


def _nominal_length(graph: StageGraph, needs: Needs, order: Sequence[Action]) -> int:
    """When the last rank is done, each class of ranks running its part of the order as soon as it can."""
    scale = nominal_scale(graph)
    free: dict[object, int] = {}
    end: dict[Action, int] = {}
    for action in order:
        ready = max([end[need] for need in needs[action] if need.lane != action.lane], default=0)
        for alike in graph.occupies[action.lane]:
            free[alike] = max(ready, free.get(alike, 0)) + nominal_duration(graph, action, scale)
        end[action] = max(free[alike] for alike in graph.occupies[action.lane])
    return max(end.values())


def _units_ahead(work: LaneWork, module: str) -> int:
    """Units whose forwards come before the module's first backward; all of them, if it has none."""
    units = set()
    for action in work.lanes[f"{module}.0"]:
        if action.kind is not Kind.F:
            break
        units.add(action.unit)
    return len(units)


def _each_least(*cuts: Cut) -> Cut:
    return tuple(map(min, zip(*cuts)))


def _each_most(*cuts: Cut) -> Cut:
    return tuple(map(max, zip(*cuts)))
