"""Bytes on a rank, by what holds them: what stays (`static`), what each live unit adds (`unit`), what comes and goes.

    peak of a rank = sum of its lanes' static + worst moment of (live units x unit) + largest workspace of its lanes

Adam in Megatron (core developer guide, "Distributed Optimizer", bytes per parameter without sharding):

    bf16 parameters, fp32 gradients   18 = 2 parameter + 4 gradient + 4 fp32 copy + 8 moments
    fp32 parameters, fp32 gradients   16 = 4 parameter + 4 gradient + 8 moments
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, reduce

from megatron_mosaic.cost_model.effects.counts import (
    count_activation_bytes,
    count_expert_parameters,
    count_logits_bytes,
    count_parameters,
    count_projector_parameters,
)
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.program import LaneMap, Program, map_lanes, planned_program
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, Recompute
from megatron_mosaic.plan.training import DEFAULT_SETUP, Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Workload
from megatron_mosaic.schedules.rank_classes import rank_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a rank (or of a lane, or of one of its units), by what holds them."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0  # with the fp32 copy that their loss needs
    buffers: float = 0.0  # hidden states under way between stages, parameters gathered by FSDP
    workspace: float = 0.0  # one matrix's gradient, a layer that is recomputed, the libraries' own

    @property
    def total(self) -> float:
        return math.fsum(astuple(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def times(self, count: float) -> Memory:
        """`count` of these."""
        return Memory(**{name: count * getattr(self, name) for name in self.__slots__})


@dataclass(frozen=True, kw_only=True)
class LaneMemory:
    """What one lane holds on each of its ranks: always, for every live unit, and for moments."""

    static: Memory
    unit: Memory
    workspace_bytes: float

    @cached_property
    def static_bytes(self) -> float:
        return self.static.total

    @cached_property
    def unit_bytes(self) -> float:
        return self.unit.total

    def at(self, live_units: float) -> Memory:
        """With so many units alive."""
        return self.static + self.unit.times(live_units) + Memory(workspace=self.workspace_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What a value, its gradient and its optimizer state weigh."""

    name: str
    value_bytes: int
    trained_bytes: int  # per parameter that is trained
    gradient_bytes: int
    fused_attention: bool
    library_bytes: float = 0.0  # workspaces that libraries take from PyTorch's allocator


ANALYTIC = "analytic"  # how the name of a cost model without a profile ends
BF16 = Precision(
    name="bf16", value_bytes=2, trained_bytes=18, gradient_bytes=4, fused_attention=True, library_bytes=0.1e9
)
# the CPU runtime
FP32 = Precision(name="fp32", value_bytes=4, trained_bytes=16, gradient_bytes=4, fused_attention=False)


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


def trained_parameters(module: ModuleConfig, plan: ModulePlan, stage: int) -> float:
    """Those of `stage_parameters` that are trained: all, none, or the projector of a frozen module."""
    if not module.frozen:
        return stage_parameters(module, plan, stage)
    last = stage == plan.layout.pp - 1
    return count_projector_parameters(module) if module.trains_projector and last else 0.0


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


def estimate_lane(
    module: ModuleConfig,
    plan: ModulePlan,
    stage: int,
    items: int,
    precision: Precision,
    setup: TrainingSetup = DEFAULT_SETUP,
) -> LaneMemory:
    """One stage on one rank; a unit of `items` items, on one of its virtual stages."""
    told = (module, plan, stage, items, precision, setup)
    return LaneMemory(
        static=_static(*told), unit=_unit(*told).times(1 / plan.layout.vpp), workspace_bytes=_workspace_bytes(*told)
    )


def _static(
    module: ModuleConfig, plan: ModulePlan, stage: int, items: int, precision: Precision, setup: TrainingSetup
) -> Memory:
    """Parameters, gradients, optimizer state and message buffers of one stage on one rank. `items`: of a unit.

    Sharded optimizer: 6 + 12 / d bytes a parameter in bf16 (core developer guide); gradients and parameters follow
    in the further stages (Rajbhandari et al. 2020, figure 1), which gather two layers at a time.
    """
    parameters, trained = stage_parameters(module, plan, stage), trained_parameters(module, plan, stage)
    experts = 0.0 if module.frozen else stage_expert_parameters(module, plan)
    value, gradient = precision.value_bytes, precision.gradient_bytes
    state = precision.trained_bytes - value - gradient
    buffers = 2.0 * _hidden_bytes(module, plan, items, precision) if plan.layout.pp > 1 else 0.0  # one each way
    level = list(Sharding).index(setup.sharding)
    held = Memory(parameters=value * (parameters - trained), buffers=buffers)
    for count, shards in zip((trained - experts, experts), shards_of(plan.layout)):
        held += Memory(
            parameters=value * count / (shards if level > 2 else 1),
            gradients=gradient * count / (shards if level > 1 else 1),
            optimizer=state * count / (shards if level > 0 else 1),
        )
    if setup.sharding is Sharding.parameters and not module.frozen:
        layer = count_parameters(module, Part.layer, plan.layout.tp, plan.layout.ep * plan.layout.etp)
        held += Memory(buffers=2.0 * value * layer)
    return held


def _unit(
    module: ModuleConfig, plan: ModulePlan, stage: int, items: int, precision: Precision, setup: TrainingSetup
) -> Memory:
    """Activations and logits that one live unit of `items` items keeps on one rank of a stage.

    Full recomputation keeps each layer's input only (Korthikanti et al. 2022: 2sbh); selective drops the attention
    matrix.
    """
    parts = stage_parts(module, plan, stage)
    layers = (
        _hidden_bytes(module, plan, items, precision)
        if plan.recompute is Recompute.full
        else _kept_bytes(module, plan, Part.layer, items, precision, setup)
    )
    pre, post = (_kept_bytes(module, plan, part, items, precision, setup) for part in (Part.pre, Part.post))
    logits = items * count_logits_bytes(module, plan.layout.tp, precision.value_bytes) / plan.layout.cp
    return Memory(
        activations=parts[Part.layer] * layers + parts[Part.pre] * pre + parts[Part.post] * (post - logits),
        logits=parts[Part.post] * logits,
    )


def _workspace_bytes(
    module: ModuleConfig, plan: ModulePlan, stage: int, items: int, precision: Precision, setup: TrainingSetup
) -> float:
    """What is there for a moment: the fp32 gradient of a layer's largest matrix before it is added to its bucket, a
    layer whose activations are computed again, and what libraries keep."""
    width = max(module.ffn_hidden_size if not module.num_experts else 0, module.dense_ffn_size)
    matrix = module.hidden_size * width * (2 if module.gated else 1) / plan.layout.tp
    passing = 0.0 if module.frozen else precision.gradient_bytes * matrix
    if plan.recompute is Recompute.full:
        passing += _kept_bytes(module, plan, Part.layer, items, precision, setup)
    return precision.library_bytes + passing


def _hidden_bytes(module: ModuleConfig, plan: ModulePlan, items: int, precision: Precision) -> float:
    """Hidden states [tokens, items, hidden_size] of a unit on one rank."""
    split = plan.layout.cp * (plan.layout.tp if plan.sequence_parallel else 1)
    return precision.value_bytes * items * module.tokens_per_item * module.hidden_size / split


def _kept_bytes(
    module: ModuleConfig, plan: ModulePlan, part: Part, items: int, precision: Precision, setup: TrainingSetup
) -> float:
    """What the forward of a part keeps of a unit, unless it is recomputed as a whole."""
    each = count_activation_bytes(
        module,
        part,
        plan.layout.tp,
        value_bytes=precision.value_bytes,
        fused_attention=precision.fused_attention or plan.recompute is Recompute.selective,
        split=plan.sequence_parallel,
        dropout=setup.dropout,
    )
    return items * each / plan.layout.cp


def items_of_action(plan: Plan, workload: Workload, module: str) -> int:
    """Items that the busiest DP lane of a module takes in one full unit, at the mean count. An item is not split."""
    placed = plan.modules[module]
    samples = (
        plan.micro_batch_size
        * plan.modules[workload.backbone.name].layout.dp
        * plan.units(workload.backbone.name)[module]
    )
    return math.ceil(samples * workload.by_name[module].items_per_sample / placed.layout.dp - 1e-9)


def peak_of_classes(program: Program, lane_map: LaneMap, memory: Sequence[LaneMemory]) -> tuple[float, ...]:
    """Per class of ranks: what its lanes (`memory`) always hold, plus the worst moment of its live units, plus a
    workspace."""
    unit_bytes = [lane.unit_bytes for lane in memory]
    return tuple(
        sum(memory[lane].static_bytes for lane in lanes)
        + max(_alive(live, unit_bytes) for live in program.live_units[name])
        + max(memory[lane].workspace_bytes for lane in lanes)
        for name, lanes in enumerate(lane_map.lanes_of_class.values())
    )


def memory_of_classes(program: Program, lane_map: LaneMap, memory: Sequence[LaneMemory]) -> tuple[Memory, ...]:
    """`peak_of_classes` by what holds the bytes."""
    unit_bytes, found = [lane.unit_bytes for lane in memory], []
    for name, lanes in enumerate(lane_map.lanes_of_class.values()):
        worst = max(program.live_units[name], key=lambda live: _alive(live, unit_bytes))
        alive = add_up(lane.unit.times(n) for n, lane in zip(worst, memory) if n)
        workspace = Memory(workspace=max(memory[lane].workspace_bytes for lane in lanes))
        found.append(add_up(memory[lane].static for lane in lanes) + alive + workspace)
    return tuple(found)


def _alive(live_units: Sequence[int], unit_bytes: Sequence[float]) -> float:
    return sum(n * size for n, size in zip(live_units, unit_bytes))


def add_up(parts: Iterable[Memory]) -> Memory:
    """Their sum."""
    return reduce(Memory.__add__, parts, Memory())


def estimate_memory(plan: Plan, workload: Workload, setup: TrainingSetup) -> dict[RankSet, Memory]:
    """Ranks that have the same lanes -> the peak of each. No clock: the order of work decides what is alive."""
    lane_map, precision = map_lanes(plan, workload), precision_of(setup)
    memory = [
        estimate_lane(
            workload.by_name[name], plan.modules[name], stage, items_of_action(plan, workload, name), precision, setup
        )
        for name, stage in lane_map.lanes
    ]
    peaks = memory_of_classes(planned_program(plan.schedule, lane_map), lane_map, memory)
    return {alike.ranks: peak for alike, peak in zip(rank_classes(plan), peaks, strict=True)}


def precision_of(setup: TrainingSetup) -> Precision:
    """What values weigh in this number format. The formats of 16 bits and below keep parameters in 16 bits."""
    if setup.format is Format.fp32:
        return FP32
    return replace(BF16, name=setup.format.value, fused_attention=setup.fused_attention)
