"""Seconds and bytes of one step in closed form: what the simulator is held against.

    step = encoders + (m + (p - 1) / v) x bottleneck stage + exposed gradients + optimizer

Encoders on ranks of their own are stages before the first.

Narayanan et al. 2021, section 2.2: interleaving divides the bubble by v. A first stage of an interleaved pipeline
keeps 1 + (p - 1) / (p v) times the layers' activations of p microbatches (Korthikanti et al. 2022, section 4.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import StageCost, StepPrice, exposed_gradients_s
from megatron_mosaic.plan import Plan, ScheduleChoice
from megatron_mosaic.schedules import Kind


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Parts of a step on the critical path, and bytes of the fullest rank."""

    encoder_s: float
    backbone_s: float
    bubble_s: float
    gradients_s: float
    optimizer_s: float
    peak_bytes: float

    @property
    def step_s(self) -> float:
        return self.encoder_s + self.backbone_s + self.bubble_s + self.gradients_s + self.optimizer_s


def estimate_in_closed_form(plan: Plan, model: CostModel) -> StepCost:
    """The step of a plan whose encoders have one stage on the backbone's ranks, or ranks of their own before it."""
    price = model.price(_without_chunks(plan))
    backbone = model.workload.backbone.name
    placed = plan.modules[backbone]
    p, v, m = placed.layout.pp, placed.layout.vpp, plan.num_microbatches(backbone)
    stages, before, encoders = _sort_lanes(price, plan, backbone)
    numbers = [i for i, lane in enumerate(price.work.lanes) if lane.module == backbone]
    hops = price.transfer_s(*numbers[:2]) if p > 1 else 0.0
    busy = [_both(cost) for cost in stages]
    ahead = [cost.busy_s / m for cost in before]
    slowest, boundary_s = max([*busy, *ahead]), _boundary_s(price)
    worst = max(slowest, max(busy) + 2 * hops * (v if v > 1 else 0))
    fill = (sum(busy) - max(busy) + 2 * hops * (p - 1)) / v + sum(ahead) + max(busy) - slowest
    fill += boundary_s / m if before else 0.0
    fullest = max(stages, key=lambda cost: cost.updated_parameters)
    trained = sum(cost.updated_parameters for cost in (fullest, *encoders))
    held = [_at(cost, min(cost.num_actions, len(before) - i + p)) for i, cost in enumerate(before)]
    return StepCost(
        encoder_s=sum(cost.busy_s for cost in encoders) + (boundary_s if encoders else 0.0),
        backbone_s=m * worst,
        bubble_s=fill,
        gradients_s=max(exposed_gradients_s([stage, *encoders], price.source) for stage in stages),
        optimizer_s=price.source.optimizer_s(trained) + price.consensus_s,
        peak_bytes=max([*held, _fullest(stages, encoders, p, v, m)]),
    )


def _both(cost: StageCost) -> float:
    return cost.seconds(Kind.F) + cost.seconds(Kind.B)


def _at(cost: StageCost, live_units: float) -> float:
    memory = cost.memory
    return memory.static_bytes + live_units * memory.unit_bytes + memory.workspace_bytes


def _sort_lanes(
    price: StepPrice, plan: Plan, backbone: str
) -> tuple[list[StageCost], list[StageCost], list[StageCost]]:
    """The backbone's stages, the stages of modules on other ranks, and the modules that share its ranks."""
    ranks = plan.modules[backbone].ranks
    stages: list[StageCost] = []
    before: list[StageCost] = []
    shared: list[StageCost] = []
    for lane, cost in zip(price.work.lanes, price.costs):
        if lane.module == backbone:
            stages.append(cost)
        elif not ranks.overlaps(lane.ranks):
            before.append(cost)
        else:
            assert lane.stage == 0, f"{lane.name}: stages on the backbone's ranks need the simulator"
            shared.append(cost)
    return stages, before, shared


def _without_chunks(plan: Plan) -> Plan:
    """The plan in plain 1F1B: virtual stages change order and live units, which this file counts."""
    modules = {k: replace(placed, layout=replace(placed.layout, vpp=1)) for k, placed in plan.modules.items()}
    return replace(plan, modules=modules, schedule=ScheduleChoice("1f1b"))


def _boundary_s(price: StepPrice) -> float:
    """Rows that go from encoders to the backbone, and their gradients that come back; free where layouts agree."""
    lanes, seconds = price.work.lanes, 0.0
    for edge in price.work.edges:
        since = max(i for i, lane in enumerate(lanes) if lane.module == edge.source)
        to = min(i for i, lane in enumerate(lanes) if lane.module == edge.target)
        seconds += 2 * lanes[since].work.num_units * price.transfer_s(since, to)
    return seconds


def _fullest(stages: list[StageCost], encoders: list[StageCost], p: int, v: int, m: int) -> float:
    """The fullest rank of the backbone, with the fullest stages of the modules on its ranks."""
    found = []
    for stage, cost in enumerate(stages):
        live = min(m, p - stage) if v == 1 else min(m, p - stage + (p - 1) / v)
        beside = sum(
            each.memory.static_bytes + min(each.num_actions, p + 1) * each.memory.unit_bytes for each in encoders
        )
        extra = max((each.memory.workspace_bytes for each in encoders), default=0.0) - cost.memory.workspace_bytes
        found.append(_at(cost, live) + beside + max(0.0, extra))
    return max(found)
