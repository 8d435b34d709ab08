"""Seconds and bytes of one step in closed form, with their parts: what one prediction of a large plan costs little for.

    step = encoders + (m + (p - 1) / v) x bottleneck stage + exposed gradients + optimizer

Encoders on ranks of their own are stages before the first.

Narayanan et al. 2021, section 2.2: interleaving divides the bubble by v. A first stage of an interleaved pipeline
keeps 1 + (p - 1) / (p v) times the layers' activations of p microbatches (Korthikanti et al. 2022, section 4.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.effects.memory import Memory, add_up
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import LaneCost, PlanPrice, price_plan
from megatron_mosaic.plan import Plan, ScheduleChoice


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
    """The step of a plan whose encoders have one stage on the backbone's ranks, or ranks of their own before it."""
    plain = _without_chunks(plan)
    price = price_plan(plain, model)
    backbone = model.workload.backbone.name
    placed = plan.modules[backbone]
    p, v, m = placed.layout.pp, placed.layout.vpp, plan.num_microbatches(backbone)
    stages, before, encoders = _sort_lanes(price, backbone)
    hops = model.transfer_s(plain, (backbone, 0), (backbone, 1)) if p > 1 else 0.0
    busy = [cost.forward_s + cost.backward_s for cost in stages]
    ahead = [cost.busy_s / m for cost in before]
    slowest, boundary_s = max([*busy, *ahead]), _boundary_s(plain, model)
    worst = max(slowest, max(busy) + 2 * hops * (v if v > 1 else 0))
    fill = (sum(busy) - max(busy) + 2 * hops * (p - 1)) / v + sum(ahead) + max(busy) - slowest
    fill += boundary_s / m if before else 0.0
    exposed_s = max(price.exposed_gradients_s([stage, *encoders]) for stage in stages)
    fullest = max(stages, key=lambda cost: cost.trained_parameters)
    trained = sum(cost.trained_parameters for cost in (fullest, *encoders))
    optimizer_s = model.optimizer_s(trained) + model.consensus_s(plan)
    encoder_s = sum(cost.busy_s for cost in encoders) + (boundary_s if encoders else 0.0)
    # encoders that run inside the bubbles and beside the gradients' traffic hide there (Feng et al. 2025)
    hidden_s = fill + exposed_s if plan.schedule.name == "bubble_fill" else 0.0
    memory = [cost.memory.at(min(cost.num_units, len(before) - i + p)) for i, cost in enumerate(before)]
    memory.append(_memory(stages, encoders, p, v, m, offloads=model.setup.offloads_encoders))
    return StepCost(
        encoder_s=max(0.0, encoder_s - hidden_s),
        backbone_s=m * worst,
        bubble_s=fill,
        gradients_s=exposed_s,
        optimizer_s=optimizer_s,
        memory=max(memory, key=lambda held: held.total),
    )


def _sort_lanes(price: PlanPrice, backbone: str) -> tuple[list[LaneCost], list[LaneCost], list[LaneCost]]:
    """The backbone's stages, the stages of modules on other ranks, and the modules that share its ranks."""
    ranks = {*price.plan.modules[backbone].ranks.ranks}
    stages: list[LaneCost] = []
    before: list[LaneCost] = []
    shared: list[LaneCost] = []
    for (module, stage), cost in zip(price.lane_map.lanes, price.costs):
        if module == backbone:
            stages.append(cost)
        elif ranks.isdisjoint(cost.ranks):
            before.append(cost)
        else:
            assert stage == 0, f"{module}: stages on the backbone's ranks need the simulator"
            shared.append(cost)
    return stages, before, shared


def _without_chunks(plan: Plan) -> Plan:
    """The plan in plain 1F1B: virtual stages and filled bubbles change order and live units, which this file counts."""
    modules = {k: replace(placed, layout=replace(placed.layout, vpp=1)) for k, placed in plan.modules.items()}
    return replace(plan, modules=modules, schedule=ScheduleChoice("1f1b"))


def _boundary_s(plan: Plan, model: CostModel) -> float:
    """Rows that go from encoders to the backbone, and their gradients that come back; free where layouts agree."""
    seconds = 0.0
    for edge in model.workload.edges:
        lane = edge.source if edge.source != model.workload.backbone.name else edge.target
        units = plan.num_microbatches(model.workload.backbone.name) / plan.units(model.workload.backbone.name)[lane]
        seconds += 2 * units * model.transfer_s(plan, (edge.source, 0), (edge.target, 0))
    return seconds


def _memory(stages: list[LaneCost], encoders: list[LaneCost], p: int, v: int, m: int, *, offloads: bool) -> Memory:
    """The fullest rank of the backbone, with the fullest stages of the modules on its ranks."""
    beside = add_up(
        cost.memory.static + cost.memory.unit.times(0 if offloads else cost.min_live_units) for cost in encoders
    )
    found = []
    for stage, cost in enumerate(stages):
        live = min(m, p - stage) if v == 1 else min(m, p - stage + (p - 1) / v)
        extra = max((each.memory.workspace_bytes for each in encoders), default=0.0) - cost.memory.workspace_bytes
        found.append(cost.memory.at(live) + beside + Memory(workspace=max(0.0, extra)))
    return max(found, key=lambda memory: memory.total)
