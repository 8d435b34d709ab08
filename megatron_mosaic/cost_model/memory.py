"""Bytes on a rank: parameters, gradients and optimizer state, plus the activations of the units that are alive.

Adam in Megatron (core developer guide, "Distributed Optimizer", bytes per parameter without sharding):

    bf16 parameters, fp32 gradients   18 = 2 parameter + 4 gradient + 4 fp32 copy + 8 moments
    fp32 parameters, fp32 gradients   16 = 4 parameter + 4 gradient + 8 moments
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.cost_model.profile import Part
from megatron_mosaic.cost_model.program import LaneMap, Program, build_program, map_lanes
from megatron_mosaic.cost_model.setup import DEFAULT_SETUP, Sharding, TrainingSetup
from megatron_mosaic.cost_model.sizes import count_activation_bytes, count_expert_parameters, count_parameters
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Recompute
from megatron_mosaic.workload import ModuleConfig, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What a value, its gradient and its optimizer state weigh."""

    value_bytes: int
    trained_bytes: int  # per parameter that is trained
    gradient_bytes: int
    fused_attention: bool


ANALYTIC = "analytic"  # how the name of a cost model without a profile ends
BF16 = Precision(value_bytes=2, trained_bytes=18, gradient_bytes=4, fused_attention=True)
FP32 = Precision(value_bytes=4, trained_bytes=16, gradient_bytes=4, fused_attention=False)  # the CPU runtime


def stage_parts(module: ModuleConfig, plan: ModulePlan, stage: int) -> Mapping[Part, int]:
    """How often each part occurs in a pipeline stage."""
    return {
        Part.pre: int(stage == 0),
        Part.layer: module.num_layers // plan.layout.pp,
        Part.post: int(stage == plan.layout.pp - 1),
    }


def stage_parameters(module: ModuleConfig, plan: ModulePlan, stage: int) -> float:
    """Parameters of one stage on one rank. The last of several stages keeps its own copy of tied embeddings."""
    parts = stage_parts(module, plan, stage)
    tied = module.vocab_size and not module.untied_output
    copy = module.vocab_size * module.hidden_size / plan.layout.tp if tied and stage and parts[Part.post] else 0.0
    return copy + sum(
        count * count_parameters(module, part, plan.layout.tp, plan.layout.ep * plan.layout.etp)
        for part, count in parts.items()
    )


def stage_expert_parameters(module: ModuleConfig, plan: ModulePlan) -> float:
    """Parameters of the routed experts of one stage on one rank."""
    if not module.num_experts:
        return 0.0
    layers = module.num_layers // plan.layout.pp
    return layers * count_expert_parameters(module, plan.layout.ep, plan.layout.etp)


def shards_of(layout: Layout) -> tuple[int, int]:
    """Ranks over which the optimizer of dense and of expert parameters is sharded."""
    dense = layout.dp * layout.cp
    return dense, max(1, dense * layout.tp // (layout.ep * layout.etp))


def estimate_static_bytes(
    module: ModuleConfig, plan: ModulePlan, stage: int, precision: Precision, setup: TrainingSetup = DEFAULT_SETUP
) -> float:
    """Parameters, gradients and optimizer state of one stage on one rank.

    Sharded optimizer: 6 + 12 / d bytes a parameter in bf16 (core developer guide); gradients and parameters follow
    in the further stages (Rajbhandari et al. 2020, figure 1).
    """
    parameters, experts = stage_parameters(module, plan, stage), stage_expert_parameters(module, plan)
    if module.frozen:
        return precision.value_bytes * parameters
    value, gradient = precision.value_bytes, precision.gradient_bytes
    state = precision.trained_bytes - value - gradient
    total = 0.0
    for count, shards in zip((parameters - experts, experts), shards_of(plan.layout)):
        level = list(Sharding).index(setup.sharding)
        parts = (state / (shards if level > 0 else 1), gradient / (shards if level > 1 else 1))
        total += count * (sum(parts) + value / (shards if level > 2 else 1))
    return total


def estimate_activation_bytes(
    module: ModuleConfig,
    plan: ModulePlan,
    stage: int,
    items: int,
    precision: Precision,
    setup: TrainingSetup = DEFAULT_SETUP,
) -> float:
    """Bytes that one live unit of `items` items holds on one rank of a stage.

    Full recomputation keeps each layer's input only (Korthikanti et al. 2022: 2sbh); selective drops the attention
    matrix.
    """
    total = 0.0
    for part, count in stage_parts(module, plan, stage).items():
        if part is Part.layer and plan.recompute is Recompute.full:
            split = plan.layout.tp if plan.sequence_parallel else 1
            per_item = precision.value_bytes * module.tokens_per_item * module.hidden_size / split
        else:
            per_item = count_activation_bytes(
                module,
                part,
                plan.layout.tp,
                value_bytes=precision.value_bytes,
                fused_attention=precision.fused_attention or plan.recompute is Recompute.selective,
                split=plan.sequence_parallel,
                dropout=setup.dropout,
            )
        total += count * items * per_item / plan.layout.cp
    return total


def items_of_action(plan: Plan, workload: Workload, module: str) -> int:
    """Items that the busiest DP lane of a module takes in one full unit, at the mean count. An item is not split."""
    placed = plan.modules[module]
    samples = plan.micro_batch_size * plan.modules[workload.backbone.name].layout.dp * (placed.unit or 1)
    return math.ceil(samples * workload.by_name[module].items_per_sample / placed.layout.dp - 1e-9)


def peak_of_classes(
    program: Program, lane_map: LaneMap, static_bytes: Sequence[float], unit_bytes: Sequence[float]
) -> tuple[float, ...]:
    """Per class of ranks: what its lanes always hold, plus the worst moment of its live units."""
    return tuple(
        sum(static_bytes[lane] for lane in lanes)
        + max(sum(n * size for n, size in zip(live, unit_bytes)) for live in program.live_units[name])
        for name, lanes in enumerate(lane_map.lanes_of_class.values())
    )


def estimate_peak_bytes(plan: Plan, workload: Workload, precision: Precision) -> dict[int, float]:
    """Rank -> peak bytes, for ranks that have a lane. No clock: the order of work decides what is alive."""
    lane_map = map_lanes(plan, workload)
    static_bytes, unit_bytes = [], []
    for module, stage in lane_map.lanes:
        config, placed = workload.by_name[module], plan.modules[module]
        items = items_of_action(plan, workload, module)
        static_bytes.append(estimate_static_bytes(config, placed, stage, precision))
        unit_bytes.append(estimate_activation_bytes(config, placed, stage, items, precision) / placed.layout.vpp)
    peaks = peak_of_classes(build_program(plan.schedule, lane_map), lane_map, static_bytes, unit_bytes)
    return {rank: peaks[position] for rank, position in lane_map.class_of_rank(plan).items()}


def precision_of(plan: Plan) -> Precision:
    """bf16 for a plan that was made for GPUs, else fp32: the CPU runtime's."""
    return BF16 if plan.predicted and plan.predicted.cost_model.endswith(ANALYTIC) else FP32
