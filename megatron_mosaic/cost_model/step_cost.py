"""Seconds and bytes of one step in closed form, with their parts: what one prediction of a large plan costs little for.

    step = encoders + (m + (p - 1) / v) x bottleneck stage + exposed gradients + optimizer

Encoders on ranks of their own are stages before the first.

Narayanan et al. 2021, section 2.2: interleaving divides the bubble by v. A first stage of an interleaved pipeline
keeps 1 + (p - 1) / (p v) times the layers' activations of p microbatches (Korthikanti et al. 2022, section 4.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.memory import Memory, add_up
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import LaneCost, PlanPrice, price_plan
from megatron_mosaic.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Parts of a step on the critical path, and of the fullest rank's memory."""

    encoder_s: float
    backbone_s: float
    bubble_s: float
    gradients_s: float
    optimizer_s: float
    memory: Memory

    @property
    def step_s(self) -> float:
        return self.encoder_s + self.backbone_s + self.bubble_s + self.gradients_s + self.optimizer_s

    @property
    def peak_bytes(self) -> float:
        return self.memory.total


def estimate_step(plan: Plan, model: CostModel) -> StepCost:
    """The step of a plan whose encoders share the backbone's ranks, or stand before it as further pipeline stages."""
    price = price_plan(_without_chunks(plan), model)
    backbone = model.workload.backbone.name
    placed = plan.modules[backbone]
    p, v, m = placed.layout.pp, placed.layout.vpp, plan.num_microbatches(backbone)
    stages, before, shared = _sort_lanes(price, backbone)
    hops = _hop_s(plan, model, backbone) if p > 1 else 0.0
    busy = [cost.forward_s + cost.backward_s for cost in stages]
    ahead = [cost.busy_s / m for cost in before]
    slowest, boundary_s = max([*busy, *ahead]), _boundary_s(plan, model)
    worst = max(slowest, max(busy) + 2 * hops * (v if v > 1 else 0))
    fill = (sum(busy) - max(busy) + 2 * hops * (p - 1)) / v + sum(ahead) + max(busy) - slowest
    fill += boundary_s / m if before else 0.0
    encoders = [_fullest(costs) for costs in shared.values()]
    exposed_s = max(price.exposed_gradients_s([stage, *encoders]) for stage in stages)
    trained = _fullest(stages).trained_parameters + sum(cost.trained_parameters for cost in encoders)
    optimizer_s = model.optimizer_s(trained) + model.consensus_s(plan)
    encoder_s = sum(map(_module_s, shared.values())) + (boundary_s if shared else 0.0)
    # encoders that run inside the bubbles and beside the gradients' traffic hide there (Feng et al. 2025)
    hidden_s = fill + exposed_s if plan.schedule == "bubble_fill" else 0.0
    memory = [_held(cost, min(cost.num_units, len(before) - i + p)) for i, cost in enumerate(before)]
    memory.append(_memory(stages, encoders, p, v, m, offloads=model.setup.offloads_encoders))
    return StepCost(
        encoder_s=max(0.0, encoder_s - hidden_s),
        backbone_s=m * worst,
        bubble_s=fill,
        gradients_s=exposed_s,
        optimizer_s=optimizer_s,
        memory=max(memory, key=lambda held: held.total),
    )


def _sort_lanes(price: PlanPrice, backbone: str) -> tuple[list[LaneCost], list[LaneCost], dict[str, list[LaneCost]]]:
    """The backbone's stages, the stages of modules on other ranks, and by module those that share its ranks."""
    ranks = {*price.plan.modules[backbone].ranks.ranks}
    stages: list[LaneCost] = []
    before: list[LaneCost] = []
    shared: dict[str, list[LaneCost]] = {}
    for (module, _), cost in zip(price.lane_map.lanes, price.costs):
        if module == backbone:
            stages.append(cost)
        elif ranks.isdisjoint(cost.ranks):
            before.append(cost)
        else:
            shared.setdefault(module, []).append(cost)
    return stages, before, shared


def _module_s(stages: list[LaneCost]) -> float:
    """All units of a module through its stages, one after the other."""
    return max(cost.busy_s for cost in stages) * (1 + (len(stages) - 1) / stages[0].num_units)


def _without_chunks(plan: Plan) -> Plan:
    """The plan in plain 1F1B: virtual stages and filled bubbles change order and live units, which this file counts."""
    modules = {k: replace(placed, layout=replace(placed.layout, vpp=1)) for k, placed in plan.modules.items()}
    return replace(plan, modules=modules, schedule="1f1b")


def _boundary_s(plan: Plan, model: CostModel) -> float:
    """Rows that go from encoders to the backbone, and their gradients that come back; free where layouts agree."""
    plan, seconds = _without_chunks(plan), 0.0
    for edge in model.workload.edges:
        lane = edge.source if edge.source != model.workload.backbone.name else edge.target
        units = plan.num_microbatches(model.workload.backbone.name) / (plan.modules[lane].unit or 1)
        seconds += 2 * units * model.transfer_s(plan, (edge.source, 0), (edge.target, 0))
    return seconds


def _hop_s(plan: Plan, model: CostModel, backbone: str) -> float:
    return model.transfer_s(_without_chunks(plan), (backbone, 0), (backbone, 1))


def _fullest(stages: list[LaneCost]) -> LaneCost:
    return max(stages, key=lambda cost: cost.static_bytes)


def _held(cost: LaneCost, live_units: float) -> Memory:
    return cost.static + cost.unit.times(live_units) + Memory(workspace=cost.workspace_bytes)


def _memory(stages: list[LaneCost], encoders: list[LaneCost], p: int, v: int, m: int, *, offloads: bool) -> Memory:
    """The fullest rank of the backbone, with the fullest stages of the modules on its ranks."""
    beside = add_up(cost.static + cost.unit.times(0 if offloads else cost.min_live_units) for cost in encoders)
    found = []
    for stage, cost in enumerate(stages):
        live = min(m, p - stage) if v == 1 else min(m, p - stage + (p - 1) / v)
        held = _held(cost, live) + beside
        extra = max((each.workspace_bytes for each in encoders), default=0.0) - cost.workspace_bytes
        found.append(held + Memory(workspace=max(0.0, extra)))
    return max(found, key=lambda memory: memory.total)
