"""A row's predicted step: the simulator that plans are searched with, on the row's own plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published.rows import Case
from megatron_mosaic.cost_model.simulate import estimate_step
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.cluster import Cluster, GpuType
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPrediction:
    """Of one case."""

    step_s: float
    peak_bytes: float


def estimate_case(case: Case, gpu: GpuType | None = None) -> RowPrediction:
    """The prediction of a case, on its own GPU type or on another set of constants."""
    cluster = replace(case.cluster, gpu=gpu) if gpu else case.cluster
    return _estimate(case.plan, case.workload, cluster, case.setup)


@lru_cache(maxsize=4096)
def _estimate(plan: Plan, workload: Workload, cluster: Cluster, setup: TrainingSetup) -> RowPrediction:
    """Repeated runs of one configuration are predicted once; of long steps two short ones are enough."""
    step = estimate_step(CostModel(workload, cluster, setup=setup).price(plan))
    return RowPrediction(step_s=step.step_s, peak_bytes=step.simulation.peak_bytes)
