"""What predictions are made with: a workload, a cluster, and where costs come from. Deterministic, no I/O."""

from __future__ import annotations

from megatron_mosaic.cost_model.hardware.profile import Profile
from megatron_mosaic.cost_model.price import StageCost, StepPrice, price_stage
from megatron_mosaic.cost_model.source import build_cost_source
from megatron_mosaic.cost_model.work import StageWork, StepWork, list_stage_work
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.training import DEFAULT_SETUP, TrainingSetup
from megatron_mosaic.plan.workload import Workload


class CostModel:
    """Remembers what it has priced; two lanes with the same work cost the same."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        profile: Profile | None = None,
        setup: TrainingSetup = DEFAULT_SETUP,
    ) -> None:
        self.workload, self.cluster = workload, cluster
        self.source = build_cost_source(workload, cluster, profile, setup)
        self._costs: dict[StageWork, StageCost] = {}

    @property
    def name(self) -> str:
        """For `predicted.cost_model`."""
        return self.source.name

    def price(self, plan: Plan) -> StepPrice:
        """Costs of a plan's step. ProfileError where a measurement is missing."""
        return self.price_work(list_stage_work(plan, self.workload, self.cluster.gpus_per_node))

    def price_work(self, work: StepWork) -> StepPrice:
        """Costs of all lanes."""
        return StepPrice(work=work, source=self.source, costs=tuple(self.stage_cost(lane.work) for lane in work.lanes))

    def stage_cost(self, work: StageWork) -> StageCost:
        """Of one lane, priced once."""
        if work not in self._costs:
            self._costs[work] = price_stage(work, self.source)
        return self._costs[work]


def memory_limit_bytes(cluster: Cluster, memory_frac: float) -> float:
    """What a rank may use of its device."""
    return memory_frac * cluster.gpu.memory_bytes
