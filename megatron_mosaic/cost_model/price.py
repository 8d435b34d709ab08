"""What a plan's lanes cost, before anything is put in order: enough for lower bounds, and cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_mosaic.cost_model.effects.memory import LaneMemory
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.program import Lane, LaneMap, map_lanes
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.training import Sharding
from megatron_mosaic.schedules.passes import stage_ranks
from megatron_mosaic.schedules.stage_graph import StageGraph

_NEVER_HIDDEN_FRAC = 0.1  # of the gradients' traffic: the last bucket has no backward left beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneCost:
    """Seconds of one lane's actions and of its tail, and what each of its ranks holds.

    An action is a unit on one virtual stage: its share of the stage's layers.
    """

    forward_s: float
    backward_s: float
    num_units: int
    threads: int  # at work on all ranks of the stage together
    gradients_s: float
    trained_parameters: float
    memory: LaneMemory
    min_live_units: int  # at some moment at least so many units are alive
    ranks: tuple[int, ...]

    @property
    def busy_s(self) -> float:
        """Of all units, forward and backward."""
        return self.num_units * (self.forward_s + self.backward_s)


@dataclass(frozen=True, kw_only=True)
class PlanPrice:
    """Costs per lane and per class of ranks (ranks with the same lanes), and bounds that need no clock."""

    plan: Plan
    model: CostModel
    lane_map: LaneMap
    costs: tuple[LaneCost, ...]  # by lane

    @property
    def lanes_of_class(self) -> Mapping[int, tuple[int, ...]]:
        return self.lane_map.lanes_of_class

    @property
    def shared_cores(self) -> int:
        return self.model.cluster.shared_cores

    @cached_property
    def gradients_s(self) -> dict[int, float]:
        """Per class: the collectives of its modules' gradients, one after the other, as far as nothing hides them."""
        return {
            name: self.exposed_gradients_s([self.costs[i] for i in lanes])
            for name, lanes in self.lanes_of_class.items()
        }

    def exposed_gradients_s(self, costs: Sequence[LaneCost]) -> float:
        """Of a rank with these lanes. Traffic hides behind the last backward of each; that of FSDP behind all work."""
        setup = self.model.setup
        total = sum(cost.gradients_s for cost in costs)
        if not setup.gradient_overlap_frac:
            return total
        whole = setup.sharding is Sharding.parameters
        over_s = sum(cost.busy_s if whole else cost.backward_s for cost in costs)
        return max(_NEVER_HIDDEN_FRAC * total, total - setup.gradient_overlap_frac * over_s)

    @cached_property
    def optimizer_s(self) -> dict[int, float]:
        """Per class. On shared cores all ranks compute at once."""
        ranks = {rank for cost in self.costs for rank in cost.ranks}
        slow = max(1.0, len(ranks) / self.shared_cores) if self.shared_cores else 1.0
        return {
            name: slow * self.model.optimizer_s(sum(self.costs[i].trained_parameters for i in lanes)) + self.consensus_s
            for name, lanes in self.lanes_of_class.items()
        }

    @cached_property
    def data_s(self) -> float:
        """Before the first action every rank loads the global batch; on shared cores they slow each other down."""
        profile = self.model.profile
        if profile is None or not self.shared_cores:
            return 0.0
        slow = max(1.0, self.plan.world_size / self.shared_cores)
        return slow * self.plan.global_batch_size * profile.overheads.sample_s

    @cached_property
    def consensus_s(self) -> float:
        """A small all-reduce over the world: once for the token count, once for norm and skip decision."""
        return self.model.consensus_s(self.plan)

    @property
    def step_overhead_s(self) -> float:
        profile = self.model.profile
        return profile.overheads.step_s if profile and self.shared_cores else 0.0

    @cached_property
    def lower_bound_s(self) -> float:
        """No step is faster: the busiest rank's work, and the way to each lane's first action before its work."""
        gradients_s = self.gradients_s
        bounds = [
            sum(self.costs[i].busy_s for i in lanes) + gradients_s[name] for name, lanes in self.lanes_of_class.items()
        ]
        if self.shared_cores:
            bounds.append(sum(cost.busy_s * cost.threads for cost in self.costs) / self.shared_cores)
        lanes, graph = self.lane_map.lanes, self.lane_map.graph
        position = {lane: i for i, lane in enumerate(lanes)}
        before: dict[Lane, float] = {}
        for module, stage in lanes:  # modules stand in topological order
            sources = [(module, stage - 1)] if stage else []
            if not stage:
                sources = [(a, graph.num_stages[a] - 1) for a, b in graph.edges if b == module]
            before[module, stage] = max((before[s] + self.costs[position[s]].forward_s for s in sources), default=0.0)
            cost = self.costs[position[module, stage]]
            bounds.append(before[module, stage] + cost.busy_s + cost.gradients_s)
        tail_s = self.consensus_s + max(self.optimizer_s.values()) + self.step_overhead_s
        return self.data_s + max(bounds) + tail_s

    @cached_property
    def lower_bound_bytes(self) -> float:
        """No schedule needs less on the fullest rank: its parameters, and the units of its hungriest lane."""
        return max(
            sum(self.costs[i].memory.static_bytes for i in lanes)
            + max(self.costs[i].min_live_units * self.costs[i].memory.unit_bytes for i in lanes)
            + max(self.costs[i].memory.workspace_bytes for i in lanes)
            for lanes in self.lanes_of_class.values()
        )


def price_plan(plan: Plan, model: CostModel) -> PlanPrice:
    """Costs of all lanes of a plan. ProfileError where a measurement is missing."""
    lane_map = map_lanes(plan, model.workload)
    return PlanPrice(
        plan=plan,
        model=model,
        lane_map=lane_map,
        costs=tuple(_price_lane(plan, model, lane_map.graph, module, stage) for module, stage in lane_map.lanes),
    )


def _price_lane(plan: Plan, model: CostModel, graph: StageGraph, module: str, stage: int) -> LaneCost:
    num_units, chunks = graph.num_units(module), graph.chunks(module)
    # 1F1B warms up with a unit for each stage behind it; other schedules may keep fewer
    min_live_units = min(num_units, graph.stages_after(module, stage) + 1) if plan.schedule.name == "1f1b" else 1
    items = model.items_of_action(plan, module)
    key = (module, stage, plan.modules[module], items, num_units, min_live_units)
    if key not in model.lane_costs:
        forward, backward = (model.action_cost(plan, module, stage, backward=b) for b in (False, True))
        ranks = stage_ranks(plan, module, stage)
        model.lane_costs[key] = LaneCost(
            forward_s=forward.busy_s / chunks,
            backward_s=backward.busy_s / chunks if module in graph.has_backward else 0.0,
            num_units=num_units * chunks,
            threads=forward.threads * len(ranks),
            gradients_s=model.gradient_sync_s(plan, module, stage),
            trained_parameters=model.trained_parameters(plan, module, stage),
            memory=model.lane_memory(plan, module, stage),
            min_live_units=min_live_units,
            ranks=ranks,
        )
    cost: LaneCost = model.lane_costs[key]
    return cost
