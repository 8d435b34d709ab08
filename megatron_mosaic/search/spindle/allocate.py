"""How many devices each MetaOp of a level gets: real numbers by bisection, then two valid numbers for each.

Spindle, section 3.3. Theorem 1: with positive, non-increasing times, the relaxed optimum starts and ends all MetaOps
together: T_m(n_m) * L_m = C* and sum n_m = N. C is bisected; n_m(C) is `Curve.devices`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mosaic.search.spindle.metaops import MetaOp

_PRECISION = 1e-6  # of C*


@dataclass(frozen=True, slots=True)
class Piece:
    """So many layers of a MetaOp on so many devices."""

    count: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """`best_s`: C*, which no schedule of the relaxed level beats; pieces by MetaOp, most devices first."""

    best_s: float
    pieces: dict[MetaOp, tuple[Piece, ...]]


def relaxed_optimum_s(ops: Sequence[MetaOp], num_devices: int) -> float:
    """C* of a level (Spindle, algorithm 2)."""
    low = max(op.num_layers * op.curve.seconds[-1] for op in ops)
    high = sum(op.num_layers * op.curve.seconds[0] for op in ops)

    def devices(seconds: float) -> float:
        return sum(op.curve.devices(seconds / op.num_layers) for op in ops)

    if high <= low or devices(low) <= num_devices:
        return low  # one MetaOp is slower on its most devices than all others together
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if devices(middle) < num_devices:
            high = middle
        else:
            low = middle
    return high


def allocate(ops: Sequence[MetaOp], num_devices: int) -> Allocation:
    """C* and the pieces of a level."""
    best_s = relaxed_optimum_s(ops, num_devices)
    return Allocation(best_s=best_s, pieces={op: discretise(op, best_s) for op in ops})


def discretise(op: MetaOp, best_s: float) -> tuple[Piece, ...]:
    """Layers on the two valid numbers next to the real one, so that together they take `best_s` (equations 10a, 10b):
    l_up + l_down = L and T(n_up) l_up + T(n_down) l_down = C*. Below the fewest devices all layers are on those."""
    counts, seconds, layers = op.curve.counts, op.curve.seconds, op.num_layers
    each_s = best_s / layers
    if each_s >= seconds[0]:
        return (Piece(counts[0], layers),)
    i = bisect_right([-s for s in seconds], -each_s)  # the first that is faster
    if i == len(counts):
        return (Piece(counts[-1], layers),)
    slow, fast = seconds[i - 1], seconds[i]
    up = min(layers, max(0, round((slow * layers - best_s) / (slow - fast))))
    pieces = Piece(counts[i], up), Piece(counts[i - 1], layers - up)
    return tuple(piece for piece in pieces if piece.num_layers)
