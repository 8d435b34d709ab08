"""How much two modules beside each other slow each other down: measured pairs, a model of them, its error on others.

    side alone, over what it may be granted        -> seconds, host seconds, bytes that it moves and comes back to
    two sides beside each other, over their grants -> seconds until both have ended
    fit: the constants of `cost_model/effects/interference.py` with which that model gives these seconds

While one side is left, it runs as if alone on what it was granted. The error that counts is that of pairs which the
fit has not seen: `held_out` leaves each out in turn.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.cost_model.effects.interference import CoRunner, Interference
from megatron_mosaic.errors import ProfileError

_RESIDUALS = tuple(step / 10 for step in range(31))  # 0 to 3
_SERIAL_FRACS = tuple(step / 5 for step in range(6))  # 0 to 1
_CACHES = (0.0, *(2.0**power for power in range(19, 26)))  # 0, then 512 KiB to 32 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A module's forward and backward alone. `alone_s`: seconds by cores or SMs; `host_s`: of them the host's own;
    `footprint_bytes`: that it comes back to."""

    name: str
    alone_s: Mapping[int, float]
    moved_bytes: float
    host_s: float
    footprint_bytes: float = math.inf

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

    def runner(self, granted: int) -> CoRunner:
        """The side on what is granted."""
        return CoRunner(
            alone_s=self.on(granted),
            moved_bytes=self.moved_bytes,
            footprint_bytes=self.footprint_bytes,
            host_s=self.host_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTime:
    """Seconds until two sides that began together have both ended."""

    sides: tuple[Side, Side]
    granted: tuple[int, int]
    beside_s: float

    @property
    def names(self) -> frozenset[str]:
        return frozenset(side.name for side in self.sides)

    def predict_s(self, model: Interference) -> float:
        return model.until_all_end_s([side.runner(count) for side, count in zip(self.sides, self.granted)])

    def predict_gain(self, model: Interference, whole: int) -> float:
        """Over taking turns on the whole device."""
        runners = [side.runner(count) for side, count in zip(self.sides, self.granted)]
        return model.gain_beside([side.on(whole) for side in self.sides], runners)


class Fit:
    """Every candidate's prediction of every pair, worked out once: any pairs may be left out of a fit."""

    def __init__(self, pairs: Sequence[PairTime], bandwidth_bytes_per_s: float) -> None:
        if not pairs:
            raise ProfileError("interference", got="no pair", expected="pairs beside each other", fix="measure some")
        self.pairs = pairs
        grid = itertools.product(_RESIDUALS, _SERIAL_FRACS, _CACHES)
        self._models = [
            Interference(
                bandwidth_bytes_per_s=bandwidth_bytes_per_s,
                residual=residual,
                serial_frac=serial,
                cache_bytes=cache,
                is_measured=True,
            )
            for residual, serial, cache in grid
        ]
        self._off = [[abs(math.log(pair.predict_s(model) / pair.beside_s)) for pair in pairs] for model in self._models]

    def best(self, left_out: Collection[frozenset[str]] = ()) -> Interference:
        """The constants with the least mean error (of logarithms) over the pairs that are not left out, by the names of
        their sides; on ties the smaller ones."""
        kept = [i for i, pair in enumerate(self.pairs) if pair.names not in left_out]
        if not kept:
            raise ProfileError("interference", got="every pair left out", expected="others", fix="measure more pairs")
        errors = [round(statistics.fmean([off[i] for i in kept]), 12) for off in self._off]
        return self._models[min(range(len(errors)), key=errors.__getitem__)]

    def held_out(self) -> list[Interference]:
        """By pair, the constants fitted to the pairs of other sides only."""
        return [self.best((pair.names,)) for pair in self.pairs]


def error_frac(pairs: Sequence[PairTime], models: Sequence[Interference]) -> float:
    """Mean over the pairs of |predicted / measured - 1|."""
    return statistics.fmean(abs(pair.predict_s(model) / pair.beside_s - 1) for pair, model in zip(pairs, models))
