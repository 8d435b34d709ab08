"""Few constants of a GPU type from measured steps: robust least squares on the logarithm of predicted / measured.

The declared subset: the rows of FITTED_FILES that the model predicts. Folds split layouts by a hash, so that a row's
fold never depends on its neighbours; each fold's constants come from the other folds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy.optimize import least_squares

from megatron_mosaic.cost_model.published.prediction import estimate_case
from megatron_mosaic.cost_model.published.rows import Case
from megatron_mosaic.plan.cluster import GpuType

Constants = Mapping[str, float]  # fitted fields of GpuType
NUM_FOLDS = 4
FITTED_FILES = (
    "korthikanti2022_table5", "narayanan2021_table1", "vtrain_multi_node_a100", "vtrain_single_node_a100",
    "mimo_vlm_h100", "simumax_b200", "megatron_bridge_perf", "nemo_megatron_h100_b200", "flagperf",
    "llm_foundry_mpt",
)  # fmt: skip
ATTENTION_ONLY = ("llm_foundry_mpt",)  # not Megatron: of these, only rows where attention decides
LONG = 16384  # tokens, from where on it does
# name -> (lower, usual, upper): what the hardware allows, and what a constant is that the rows say nothing about.
# Upper ends: the best that libraries' own benchmarks show of a datasheet (large products and copies, NCCL's bus
# bandwidth without reductions in the switch); a product in 8 bits is no better used than one in 16
BOUNDS = {
    "gemm_efficiency_frac": (0.45, 0.75, 0.95),
    "attention_efficiency_frac": (0.2, 0.5, 0.85),
    "bandwidth_frac": (0.3, 0.75, 0.93),
    "intra_frac": (0.4, 0.8, 0.93),
    "network_frac": (0.3, 0.8, 0.93),
    "half_depth": (10.0, 200.0, 1000.0),
    "launch_s": (2e-6, 12e-6, 40e-6),
    "low_precision_frac": (0.4, 0.85, 1.0),
}
OWN = ("gemm_efficiency_frac", "intra_frac", "network_frac")  # what power limits and networks make of the same SMs
_PRIOR_WEIGHT = 0.2  # twice or half the usual value costs as much as an error of 3 % in one of the files


def fold_of(case: Case) -> int:
    """The same for all runs of one layout of a model, whatever their batches: none is predicted from its like."""
    plan, modules = case.plan, case.workload.modules
    layouts = [(name, each.layout.degrees, each.layout.vpp, each.layout.ep) for name, each in plan.modules.items()]
    sizes = [(each.num_layers, each.hidden_size, each.ffn_hidden_size, each.num_experts) for each in modules]
    return zlib.crc32(repr((case.gpu, plan.world_size, layouts, sizes)).encode()) % NUM_FOLDS


def at_bound(name: str, value: float) -> bool:
    """Whether a fitted constant is as far as the hardware allows: then an effect is missing."""
    lower, _, upper = BOUNDS[name]
    return value <= lower * 1.005 or value >= upper * 0.995


def fit_constants(
    cases: Sequence[tuple[Case, float]],
    fixed: Constants,
    start: Mapping[str, Constants] | None = None,
    max_evaluations: int = 12,
) -> dict[str, Constants]:
    """GPU type -> constants fitted to (case, weight), five digits each; those in `fixed` stay as they are.

    OWN constants differ between the types, the others are theirs together.
    """
    types = sorted({case.gpu for case, _ in cases})
    shared = [(name, types) for name in BOUNDS if name not in fixed and name not in OWN]
    slots = shared + [(name, [gpu]) for name in OWN for gpu in types]
    lower, usual, upper = ([math.log(BOUNDS[name][side]) for name, _ in slots] for side in range(3))

    def of(point: Sequence[float]) -> dict[str, dict[str, float]]:
        found = {gpu: dict(fixed) for gpu in types}
        for (name, members), value in zip(slots, point):
            for gpu in members:
                found[gpu][name] = math.exp(value)
        return found

    def residuals(point: Sequence[float]) -> list[float]:
        constants, errors = of(point), []
        for case, weight in cases:
            gpu = with_constants(case.cluster.gpu, constants[case.gpu])
            errors.append(weight * math.log(estimate_case(case, gpu).step_s / case.measured_s))
        return errors + [_PRIOR_WEIGHT * (value - first) for value, first in zip(point, usual)]

    first = [math.log(start[members[0]][name]) for name, members in slots] if start else usual
    found = least_squares(
        residuals,
        [min(max(x, a + 1e-6), b - 1e-6) for x, a, b in zip(first, lower, upper)],
        bounds=(lower, upper),
        loss="soft_l1",
        f_scale=0.05,
        diff_step=1e-3,
        max_nfev=max_evaluations,
    )
    return {
        gpu: {name: float(f"{value:.5g}") for name, value in constants.items()}
        for gpu, constants in of(found.x).items()
    }


def with_constants(gpu: GpuType, constants: Constants) -> GpuType:
    """The GPU type with other fitted constants."""
    values: dict[str, Any] = dict(constants)
    return replace(gpu, **values)
