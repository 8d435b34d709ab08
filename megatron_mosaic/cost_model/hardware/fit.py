"""Measured points -> straight lines: seconds = a + b * size, a and b not negative (scipy's NNLS).

Less work never takes longer: where it was measured to, another process was in the way, and the larger size's time
counts. Residuals are relative, so that small sizes count as much as large ones. Below the smallest measured size the
line goes on to its intercept; above `EXTRAPOLATION` times the largest it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mosaic.cost_model.hardware.profile import (
    CALIBRATE,
    CollectivePoint,
    ModulePoint,
    Operation,
    OptimizerPoint,
    Part,
    Profile,
)
from megatron_mosaic.errors import ProfileError
from megatron_mosaic.schedules.actions import Kind

EXTRAPOLATION = 4.0
_MEASURED = {Kind.F: "forward_s", Kind.B: "backward_s"}  # field of ModulePoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`intercept_s` + `slope_s` * size for sizes up to `EXTRAPOLATION` x `largest`."""

    where: str
    intercept_s: float
    slope_s: float
    largest: float

    def at(self, size: float) -> float:
        """Seconds at this size. ProfileError far outside the measured range."""
        if size > EXTRAPOLATION * self.largest:
            raise ProfileError(
                self.where,
                got=f"size {size:g}",
                expected=f"at most {EXTRAPOLATION:g} x the largest measured size, {self.largest:g}",
                fix=f"{CALIBRATE} with larger sizes, or lower search.max_micro_batch_size",
            )
        return self.intercept_s + self.slope_s * size


def fit_line(where: str, points: Sequence[tuple[float, float]]) -> Line:
    """The line through (size, seconds) points; a single point gives a flat line."""
    import numpy as np
    from scipy.optimize import nnls

    sizes, seconds = (np.array(column, dtype=float) for column in zip(*sorted(points)))
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]
    largest = float(sizes.max())
    if len(points) == 1:
        return Line(where=where, intercept_s=float(seconds[0]), slope_s=0.0, largest=largest)
    weight = 1 / np.maximum(seconds, 1e-9)
    # in units of the largest size, so that both columns have a like scale
    columns = np.stack([np.ones_like(sizes), sizes / largest], axis=1) * weight[:, None]
    (intercept_s, slope_s), _ = nnls(columns, seconds * weight)
    return Line(where=where, intercept_s=float(intercept_s), slope_s=float(slope_s) / largest, largest=largest)


class FittedProfile:
    """Lines of a profile, fitted when first asked for."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._lines: dict[tuple[object, ...], Line] = {}

    def module(self, name: str, tp: int, threads: int, part: Part, kind: Kind) -> Line:
        """Seconds over items, of one part of a module. Measured: F and B."""
        key = (name, tp, threads, part, kind)
        if key not in self._lines:
            where = f"profile: modules.{name}.{tp}.{threads}.{part}"
            rows: Sequence[ModulePoint] = self.profile.modules.get(name, {}).get(tp, {}).get(threads, ())
            points = [(p.items, getattr(p, _MEASURED[kind])) for p in rows if p.part is part]
            self._lines[key] = self._fit(where, points)
        return self._lines[key]

    def collective(self, operation: Operation, ranks: int) -> Line:
        """Seconds over bytes."""
        key = (operation, ranks)
        if key not in self._lines:
            rows: Sequence[CollectivePoint] = self.profile.collectives.get(operation, {}).get(ranks, ())
            self._lines[key] = self._fit(
                f"profile: collectives.{operation}.{ranks}", [(p.bytes, p.seconds) for p in rows]
            )
        return self._lines[key]

    def optimizer(self) -> Line:
        """Seconds over parameters of one rank."""
        if ("optimizer",) not in self._lines:
            rows: Sequence[OptimizerPoint] = self.profile.optimizer
            self._lines["optimizer",] = self._fit("profile: optimizer", [(p.params, p.seconds) for p in rows])
        return self._lines["optimizer",]

    @staticmethod
    def _fit(where: str, points: Sequence[tuple[float, float]]) -> Line:
        if not points:
            raise ProfileError(where, got="no points", expected="at least one measurement", fix=CALIBRATE)
        return fit_line(where, points)
