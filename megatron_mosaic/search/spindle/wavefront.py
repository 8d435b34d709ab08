"""Pieces of a level in waves: as many devices as possible are occupied, and all slices of a wave end at about one time.

Spindle, algorithm 1. A wave takes at most one piece of each MetaOp; devices that stay idle go to the MetaOps with most
work left; one of the pieces says how long the wave is, and of the others as many layers go as come closest to that.
What the algorithm leaves open is a `Strategy`; on the shipped workloads the fullest wave leaves 1 to 12 % above C*, the
shortest (as in the paper) up to 37 %. Sharing out anew behind each wave was tried, and made more and worse waves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from megatron_mosaic.search.spindle.allocate import Allocation, Piece, allocate
from megatron_mosaic.search.spindle.metaops import MetaOp, by_level

type Rounding = Callable[[float], int]
_ROUNDINGS: tuple[Rounding, ...] = (math.floor, round)
_SLACK = 1e-9  # of a number of layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Layers of a MetaOp in a wave, on so many devices; placed later."""

    op: MetaOp
    first_layer: int
    num_layers: int
    count: int

    @property
    def seconds(self) -> float:
        return self.num_layers * self.op.curve.at(self.count)


type Wave = tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Waves of all levels; `best_s`: the sum of their C*."""

    waves: tuple[Wave, ...]
    best_s: float

    @property
    def seconds(self) -> float:
        """With a barrier behind each wave, and nothing between."""
        return sum(wave_s(wave) for wave in self.waves)


def wave_s(wave: Wave) -> float:
    """Of its longest part."""
    return max(part.seconds for part in wave)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """`rounding`: of layers that fit a wave. `fills_devices`: a wave takes the pieces that occupy most devices, else
    those with most work left. `fullest`: it is as long as keeps its devices busiest, else as its shortest piece."""

    rounding: Rounding
    fills_devices: bool
    fullest: bool


STRATEGIES = tuple(
    Strategy(rounding=rounding, fills_devices=fills, fullest=fullest)
    for fullest, fills, rounding in product((True, False), (True, False), _ROUNDINGS)
)


def schedule_levels(ops: Sequence[MetaOp], num_devices: int, strategy: Strategy) -> Levels:
    """Allocation and waves, level by level."""
    waves: list[Wave] = []
    best_s = 0.0
    for level in by_level(ops):
        found = allocate(level, num_devices)
        waves += schedule(found, num_devices, strategy)
        best_s += found.best_s
    return Levels(waves=tuple(waves), best_s=best_s)


def schedule(allocation: Allocation, num_devices: int, strategy: Strategy) -> list[Wave]:
    """Waves of one level. Each takes a layer at least of all that it takes, so that they end."""
    left = dict(allocation.pieces)
    done = dict.fromkeys(left, 0)
    waves: list[Wave] = []
    while left:
        chosen = _extend(_occupy(left, num_devices, strategy.fills_devices), left, num_devices)
        wave = _cut(chosen, left, done, strategy)
        waves.append(wave)
        for part in wave:
            done[part.op] += part.num_layers
            left[part.op] = _without(left[part.op], chosen[part.op].piece, part.num_layers)
        left = {op: pieces for op, pieces in left.items() if pieces}
    return waves


@dataclass(frozen=True, slots=True)
class _Chosen:
    piece: Piece
    count: int  # devices, maybe more than the piece's


def _without(pieces: Sequence[Piece], taken: Piece, num_layers: int) -> tuple[Piece, ...]:
    """The pieces without so many layers of one of them."""
    rest = [Piece(p.count, p.num_layers - num_layers) if p is taken else p for p in pieces]
    return tuple(piece for piece in rest if piece.num_layers)


def _remaining_s(op: MetaOp, pieces: Sequence[Piece]) -> float:
    return sum(piece.num_layers * op.curve.at(piece.count) for piece in pieces)


def _occupy(left: Mapping[MetaOp, Sequence[Piece]], num_devices: int, fills: bool) -> dict[MetaOp, Piece]:
    """At most one piece of each MetaOp: those that occupy most devices or have most work left; of equals, the other."""
    best: dict[int, tuple[float, dict[MetaOp, Piece]]] = {0: (0.0, {})}  # devices -> most work left, whose it is
    for op, pieces in left.items():
        remaining_s = _remaining_s(op, pieces)
        for used, (work_s, chosen) in list(best.items()):
            for piece in pieces:
                total = used + piece.count
                if total <= num_devices and work_s + remaining_s > best.get(total, (-1.0, {}))[0]:
                    best[total] = work_s + remaining_s, {**chosen, op: piece}
    if fills:
        return best[max(best)][1]
    most_s = max(work_s for work_s, _ in best.values())
    return best[max(used for used, (work_s, _) in best.items() if work_s >= most_s * (1 - _SLACK))][1]


def _extend(
    chosen: Mapping[MetaOp, Piece], left: Mapping[MetaOp, Sequence[Piece]], num_devices: int
) -> dict[MetaOp, _Chosen]:
    """Idle devices go to those with most work left."""
    counts = {op: piece.count for op, piece in chosen.items()}
    idle = num_devices - sum(counts.values())
    for op in sorted(chosen, key=lambda each: -_remaining_s(each, left[each])):
        more = op.curve.most_within(counts[op] + idle)
        idle -= more - counts[op]
        counts[op] = more
    return {op: _Chosen(piece, counts[op]) for op, piece in chosen.items()}


def _cut(
    chosen: Mapping[MetaOp, _Chosen],
    left: Mapping[MetaOp, Sequence[Piece]],
    done: Mapping[MetaOp, int],
    strategy: Strategy,
) -> Wave:
    """Every piece's layers, as many as fit the wave, which is as long as one of the pieces."""
    lengths_s = sorted(each.piece.num_layers * op.curve.at(each.count) for op, each in chosen.items())
    waves = []
    for full_s in lengths_s if strategy.fullest else lengths_s[:1]:
        parts = []
        for op, each in chosen.items():
            fitting = strategy.rounding(full_s / op.curve.at(each.count) + _SLACK)
            layers = min(each.piece.num_layers, max(1, fitting))
            parts.append(Part(op=op, first_layer=done[op], num_layers=layers, count=each.count))
        waves.append(tuple(parts))
    return max(waves, key=lambda wave: _useful_devices(wave, chosen))


def _useful_devices(wave: Wave, chosen: Mapping[MetaOp, _Chosen]) -> float:
    """Devices at work in the mean of a wave, if each layer were on the number that its piece has."""
    pieces = ((part, chosen[part.op].piece) for part in wave)
    return sum(part.num_layers * part.op.curve.at(p.count) * p.count for part, p in pieces) / wave_s(wave)
