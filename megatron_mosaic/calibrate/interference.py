"""How much two modules beside each other slow each other down: measured pairs, a model of them, its error on others.

    side alone, over what it may be granted      -> seconds, host seconds, bytes it moves
    two sides beside each other, over their grants -> seconds until both have ended
    fit: memory is shared max-min fairly (cost_model/effects/interference), and two constants of a machine are fitted,
         residual     what caches and memory pages cost beyond that
         serial_frac  share of the host's seconds that one lane at a time can spend (Python's lock; launching)

While one side is left, it runs as if alone on what it was granted. The error that counts is that of pairs which the
fit has not seen: `held_out` leaves each out in turn.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.cost_model.effects.interference import CoRunner, slow_downs
from megatron_mosaic.errors import ProfileError

_RESIDUALS = tuple(step / 10 for step in range(31))  # 0 to 3
_SERIAL_FRACS = tuple(step / 10 for step in range(11))  # 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A module's forward and backward alone. `alone_s`: seconds by cores or SMs; `host_s`: of them the host's own."""

    name: str
    alone_s: Mapping[int, float]
    moved_bytes: float
    host_s: float

    def on(self, granted: int) -> float:
        """Seconds alone on what is granted. ProfileError where that was not measured."""
        if granted not in self.alone_s:
            raise ProfileError(
                f"{self.name} on {granted}",
                got=f"measured on {sorted(self.alone_s)}",
                expected="one of these",
                fix="measure it alone there, too",
            )
        return self.alone_s[granted]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTime:
    """Seconds until two sides that began together have both ended."""

    sides: tuple[Side, Side]
    granted: tuple[int, int]
    beside_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """A machine's constants. `bandwidth_bytes_per_s`: of its memory, measured."""

    bandwidth_bytes_per_s: float
    residual: float = 0.0
    serial_frac: float = 0.0

    def beside_s(self, sides: tuple[Side, Side], granted: tuple[int, int]) -> float:
        """Seconds until both have ended."""
        alone = [side.on(count) for side, count in zip(sides, granted, strict=True)]
        runners = [CoRunner(alone_s=s, moved_bytes=side.moved_bytes) for s, side in zip(alone, sides, strict=True)]
        slow = slow_downs(runners, self.bandwidth_bytes_per_s, self.residual)
        both_s = min(s * factor for s, factor in zip(alone, slow, strict=True))
        left_s = max(s - both_s / factor for s, factor in zip(alone, slow, strict=True))
        return max(both_s + left_s, self.serial_frac * sum(side.host_s for side in sides))


def fit_interference(pairs: Sequence[PairTime], bandwidth_bytes_per_s: float) -> Interference:
    """The constants with the least mean error (of logarithms) over the pairs; on ties the smaller ones."""
    if not pairs:
        raise ProfileError("interference", got="no pair", expected="pairs beside each other", fix="measure some")
    candidates = [
        Interference(bandwidth_bytes_per_s=bandwidth_bytes_per_s, residual=residual, serial_frac=serial)
        for residual, serial in itertools.product(_RESIDUALS, _SERIAL_FRACS)
    ]

    def error(model: Interference) -> float:
        return statistics.fmean(abs(math.log(model.beside_s(p.sides, p.granted) / p.beside_s)) for p in pairs)

    return min(candidates, key=lambda model: (round(error(model), 12), model.residual, model.serial_frac))


def held_out(pairs: Sequence[PairTime], bandwidth_bytes_per_s: float) -> list[float]:
    """Predicted seconds of each pair, by constants that were fitted to the pairs of other sides only."""
    found = []
    for pair in pairs:
        names = {side.name for side in pair.sides}
        others = [other for other in pairs if {side.name for side in other.sides} != names]
        model = fit_interference(others, bandwidth_bytes_per_s)
        found.append(model.beside_s(pair.sides, pair.granted))
    return found
