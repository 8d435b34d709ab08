"""Few constants of a GPU type from measured steps: robust least squares on the logarithm of predicted / measured.

The declared subset: the rows of FITTED_FILES that the model predicts. Folds split rows by a hash of their id, so that
a row's fold never depends on its neighbours; each fold's constants come from the other folds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.optimize import least_squares

from megatron_mosaic.cluster import GpuType
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published_rows import Case
from megatron_mosaic.cost_model.step_cost import StepCost, estimate_step

NUM_FOLDS = 4
FITTED_FILES = (
    "korthikanti2022_table5", "narayanan2021_table1", "vtrain_multi_node_a100", "vtrain_single_node_a100",
    "mimo_vlm_h100", "simumax_b200", "megatron_bridge_perf", "nemo_megatron_h100_b200", "flagperf",
)  # fmt: skip
# name -> (lower, upper): what the hardware allows
BOUNDS = {
    "gemm_efficiency_frac": (0.3, 0.98),
    "attention_efficiency_frac": (0.15, 0.9),
    "bandwidth_frac": (0.4, 0.95),
    "network_frac": (0.2, 0.95),
    "half_depth": (10.0, 2000.0),
    "launch_s": (1e-6, 40e-6),
    "low_precision_frac": (0.3, 1.0),
}
_PRIOR_WEIGHT = 0.02  # keeps constants that the rows say nothing about where they were


def fold_of(row_id: str) -> int:
    return zlib.crc32(row_id.encode()) % NUM_FOLDS


def estimate_case(case: Case, gpu: GpuType | None = None) -> StepCost:
    """The prediction of a case, on its own GPU type or on another set of constants."""
    cluster = replace(case.cluster, gpu=gpu) if gpu else case.cluster
    return estimate_step(case.plan, CostModel(case.workload, cluster, setup=case.setup))


def fit_gpu(gpu: GpuType, cases: Sequence[tuple[Case, float]], *, max_evaluations: int = 8) -> GpuType:
    """The GPU type with constants fitted to (case, weight)."""
    names = tuple(BOUNDS)
    start = [math.log(min(max(getattr(gpu, name), BOUNDS[name][0]), BOUNDS[name][1])) for name in names]

    def of(point: Sequence[float]) -> GpuType:
        constants: dict[str, Any] = {name: math.exp(value) for name, value in zip(names, point)}
        return replace(gpu, **constants)

    def residuals(point: Sequence[float]) -> list[float]:
        candidate = of(point)
        errors = [weight * math.log(estimate_case(case, candidate).step_s / case.measured_s) for case, weight in cases]
        return errors + [_PRIOR_WEIGHT * (value - first) for value, first in zip(point, start)]

    lower, upper = ([math.log(BOUNDS[name][side]) - 1e-9 * (1 - 2 * side) for name in names] for side in (0, 1))
    point = [min(max(x, a + 1e-6), b - 1e-6) for x, a, b in zip(start, lower, upper)]
    found = least_squares(
        residuals, point, bounds=(lower, upper), loss="soft_l1", f_scale=0.05, diff_step=1e-3, max_nfev=max_evaluations
    )
    return of(found.x)
