"""What a planner needs of predictions: of layouts that were measured side by side, is the predicted best the best?

A group: rows of one file with the same workload, GPUs, set-up and batch, whose plans differ. Regret: how much slower
the layout with the shortest predicted step was than the fastest, both as measured. Predictions: those out of sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_mosaic.cost_model.published.rows import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layouts of one job: measured and predicted seconds of each, in the same order."""

    measured_s: tuple[float, ...]
    predicted_s: tuple[float, ...]

    @property
    def regret_frac(self) -> float:
        """Of the layout that a planner would have chosen."""
        chosen = min(range(len(self.predicted_s)), key=self.predicted_s.__getitem__)
        return self.measured_s[chosen] / min(self.measured_s) - 1

    @property
    def rank_correlation(self) -> float:
        """Spearman's; 0 where one side says that all are alike."""
        return _correlation(_ranks(self.measured_s), _ranks(self.predicted_s))


def group_layouts(rows: Iterable[tuple[Case, float]]) -> tuple[Group, ...]:
    """Groups of at least two layouts among (case, predicted seconds); repeated runs of a layout count as their mean."""
    found: dict[object, dict[object, list[tuple[float, float]]]] = {}
    for case, predicted_s in rows:
        if case.measured_s:
            job = (case.workload, case.cluster, case.setup, case.plan.world_size)
            found.setdefault(job, {}).setdefault(case.plan, []).append((case.measured_s, predicted_s))
    return tuple(
        Group(
            measured_s=tuple(_mean([measured_s for measured_s, _ in runs]) for runs in layouts.values()),
            predicted_s=tuple(_mean([predicted_s for _, predicted_s in runs]) for runs in layouts.values()),
        )
        for layouts in found.values()
        if len(layouts) > 1
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    mean_a, mean_b = _mean(a), _mean(b)
    together = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    spread = math.sqrt(math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b))
    return together / spread if spread else 0.0
