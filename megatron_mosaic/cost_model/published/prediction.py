"""A row's predicted step: the simulator that plans are searched with, on the row's own plan.

One rule stands beside it. Optimus runs encoders inside the bubbles of the backbone's pipeline and beside its gradients'
traffic (Feng et al. 2025), which no schedule here does yet. Its row is simulated with the encoders before and after the
pipeline; of what they add, as much as those bubbles have room for is taken off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published.rows import Case
from megatron_mosaic.cost_model.simulate import Simulation, estimate_step, simulate
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
    return _estimate(case.plan, case.workload, cluster, case.setup, case.fills_bubbles)


@lru_cache(maxsize=4096)
def _estimate(
    plan: Plan, workload: Workload, cluster: Cluster, setup: TrainingSetup, fills_bubbles: bool
) -> RowPrediction:
    """Repeated runs of one configuration are predicted once; of long steps two short ones are enough."""
    step = estimate_step(CostModel(workload, cluster, setup=setup).price(plan))
    hidden_s = 0.0
    if fills_bubbles:
        backbone = workload.backbone
        alone = simulate(
            replace(plan, modules={backbone.name: plan.modules[backbone.name]}),
            CostModel(replace(workload, modules=(backbone,), edges=()), cluster, setup=setup),
        )
        hidden_s = min(step.step_s - alone.step_s, _room_s(alone))
    return RowPrediction(step_s=step.step_s - hidden_s, peak_bytes=step.simulation.peak_bytes)


def _room_s(simulation: Simulation) -> float:
    """Of the ranks that have least: their bubbles, and the seconds in which they wait for their gradients."""
    price = simulation.price
    classes = zip(price.work.class_lanes, simulation.class_end_s, price.gradients_s)
    return min(end_s - sum(price.costs[i].busy_s for i in lanes) + gradients_s for lanes, end_s, gradients_s in classes)
