"""Mean, 95th percentile and worst of a plan's step and memory over drawn batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.data_variance.draw import draw_batch
from megatron_mosaic.data_variance.drawn_step import StepsOfPlan
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules import Schedule

NUM_BATCHES = 256
SEED = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of what was drawn. `p95`: one of them, which at least 95 % do not exceed."""

    mean: float
    p95: float
    worst: float

    @classmethod
    def of(cls, drawn: Sequence[float]) -> Spread:
        p95 = float(np.quantile(drawn, 0.95, method="inverted_cdf"))
        return cls(mean=float(np.mean(drawn)), p95=p95, worst=max(drawn))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variance:
    """Over `num_batches` global batches. `imbalance`: by module, mean load of a unit's busiest slot over all slots'."""

    num_batches: int
    step_s: Spread
    peak_bytes: Spread
    imbalance: Mapping[str, float]

    def as_dict(self) -> dict[str, object]:
        return {
            "batches": self.num_batches,
            "step_s": asdict(self.step_s),
            "peak_bytes": asdict(self.peak_bytes),
            "imbalance": dict(self.imbalance),
        }


def estimate_variance(
    plan: Plan,
    model: CostModel,
    schedule: Schedule | None = None,
    *,
    num_batches: int = NUM_BATCHES,
    seed: int = SEED,
    progress: Callable[[int], None] = lambda done: None,
) -> Variance:
    """The same seed draws the same batches, whatever the plan is, so that plans are compared on equal data.
    ConfigError for less than one batch."""
    if num_batches < 1:
        raise ConfigError("--draws", got=num_batches, expected="a number from 0 on", fix="draw 256, or 0 for none")
    steps, generator = StepsOfPlan(plan, model, schedule), np.random.default_rng(seed)
    drawn = []
    for done in range(num_batches):
        drawn.append(steps.simulate(draw_batch(model.workload, steps.num_microbatches, steps.samples_each, generator)))
        progress(done + 1)
    return Variance(
        num_batches=num_batches,
        step_s=Spread.of([each.step_s for each in drawn]),
        peak_bytes=Spread.of([each.peak_bytes for each in drawn]),
        imbalance={name: float(np.mean([each.imbalance[name] for each in drawn])) for name in drawn[0].imbalance},
    )
