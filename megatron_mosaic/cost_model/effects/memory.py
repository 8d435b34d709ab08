"""Bytes on a rank, by what holds them: what stays (`static`), what each live unit adds (`unit`), what comes and goes.

    peak of a rank = sum of its lanes' static + worst moment of (live units x unit) + largest workspace of its lanes

Adam in Megatron (core developer guide, "Distributed Optimizer", bytes per parameter without sharding):

    bf16 parameters, fp32 gradients   18 = 2 parameter + 4 gradient + 4 fp32 copy + 8 moments
    fp32 parameters, fp32 gradients   16 = 4 parameter + 4 gradient + 8 moments
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

from megatron_mosaic.cost_model.effects.counts import count_activation_bytes, count_logits_bytes, count_parameters
from megatron_mosaic.cost_model.effects.parameters import frozen_parameters, shards_of, trained_parameters
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import Role


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
        return math.fsum(getattr(self, name) for name in self.__slots__)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What a value, its gradient and its optimizer state weigh."""

    name: str
    value_bytes: int
    trained_bytes: int  # per parameter that is trained
    gradient_bytes: int
    fused_attention: bool
    product_bytes: float  # of a value that is kept as a matrix product's input
    library_bytes: float = 0.0  # workspaces that libraries take from PyTorch's allocator


BF16 = Precision(
    name="bf16",
    value_bytes=2,
    trained_bytes=18,
    gradient_bytes=4,
    fused_attention=True,
    product_bytes=2.0,
    library_bytes=0.1e9,
)
# The CPU runtime. Fused attention kernels are 16-bit
FP32 = Precision(
    name="fp32", value_bytes=4, trained_bytes=16, gradient_bytes=4, fused_attention=False, product_bytes=4.0
)
# A block of 32 (mxfp8) or 16 (nvfp4) values has a scale of a byte (OCP MX 1.0; NVIDIA, "Introducing NVFP4")
_PRODUCT_BYTES = {Format.fp8: 1.0, Format.mxfp8: 1.0 + 1 / 32, Format.nvfp4: 0.5 + 1 / 16}


def precision_of(setup: TrainingSetup) -> Precision:
    """fp32 throughout, or 16-bit values with fp32 copies. Low formats keep inputs of products as the products read
    them (Transformer Engine casts them in the forward)."""
    if setup.format is Format.fp32:
        return FP32
    gradient_bytes = 4 if setup.gradient_format is Format.fp32 else 2
    return replace(
        BF16,
        name=setup.format.value,
        fused_attention=setup.fused_attention,
        gradient_bytes=gradient_bytes,
        trained_bytes=BF16.trained_bytes - BF16.gradient_bytes + gradient_bytes,
        product_bytes=_PRODUCT_BYTES.get(setup.format, 2.0),
    )


def stage_memory(work: StageWork, precision: Precision, setup: TrainingSetup) -> LaneMemory:
    """One stage on one rank; a unit on one of its virtual stages.

    Of a backbone's virtual stages only the last makes logits, and goes back right after: one unit's are there at a
    time.
    """
    head, layers = _head(work, precision, setup), _layers(work, precision, setup)
    static, vpp = _static(work, precision, setup), work.layout.vpp
    at_once = vpp > 1 and work.module.role is Role.backbone
    return LaneMemory(
        static=static + head if at_once else static,
        unit=layers.times(1 / vpp) if at_once else (layers + head).times(1 / vpp),
        workspace_bytes=_workspace_bytes(work, precision, setup),
    )


def _static(work: StageWork, precision: Precision, setup: TrainingSetup) -> Memory:
    """Parameters, gradients, optimizer state and message buffers of one stage on one rank.

    Sharded optimizer: 6 + 12 / d bytes a parameter in bf16 (core developer guide); gradients and parameters follow
    in the further stages (Rajbhandari et al. 2020, figure 1). Of parameters that are sharded, two layers are there as
    a whole, and what is no layer for the whole step (torch FSDP, root unit); of gradients one layer.
    """
    module, layout = work.module, work.layout
    trained, frozen = trained_parameters(work), frozen_parameters(work)
    value, gradient = precision.value_bytes, precision.gradient_bytes
    state = precision.trained_bytes - value - gradient
    buffers = 2.0 * _hidden_bytes(work, precision) if layout.pp > 1 else 0.0  # one each way
    level = list(Sharding).index(setup.sharding)
    held = Memory(parameters=value * frozen, buffers=buffers)
    for count, shards in zip(trained, shards_of(layout, setup)):
        held += Memory(
            parameters=value * count / (shards if level > 2 else 1),
            gradients=gradient * count / (shards if level > 1 else 1),
            optimizer=state * count / (shards if level > 0 else 1),
        )
    if setup.sharding is Sharding.parameters and not module.frozen:
        sizes = [
            count_parameters(module, Part.layer, layout.tp, layout.ep * layout.etp, dense=dense)
            for dense, _ in work.layers_by_mlp
        ]
        layer = max(sizes, default=0.0)
        ends = sum(work.parts()[part] * count_parameters(module, part, layout.tp) for part in (Part.pre, Part.post))
        held += Memory(buffers=value * (2.0 * layer + ends) + gradient * layer)
    return held


def _layers(work: StageWork, precision: Precision, setup: TrainingSetup) -> Memory:
    """Activations that one live unit keeps in the layers of one rank of a stage, and before them. With recomputation of
    the whole forward these are what enters the stage and what the module exports.

    Full recomputation keeps each layer's input only (Korthikanti et al. 2022: 2sbh); selective drops the attention
    matrix. Offloaded activations wait in the host's memory.
    """
    if setup.offloads_encoders and work.module.role is Role.encoder:
        return Memory()
    if work.recompute is Recompute.whole:
        return Memory(activations=_passed_bytes(work, precision))
    return _saved(work, precision, setup)


def _saved(work: StageWork, precision: Precision, setup: TrainingSetup) -> Memory:
    """What a forward saves of layers, and before them, for its backward."""
    parts = work.parts()
    layers = sum(count * _kept_bytes(work, Part.layer, precision, setup, dense) for dense, count in work.layers_by_mlp)
    if work.recompute is Recompute.full:
        again = setup.full_recompute_frac
        layers = again * work.layers * _hidden_bytes(work, precision) + (1 - again) * layers
    return Memory(activations=layers + parts[Part.pre] * _kept_bytes(work, Part.pre, precision, setup))


def _head(work: StageWork, precision: Precision, setup: TrainingSetup) -> Memory:
    """What it keeps behind the layers: activations and logits."""
    if work.recompute is Recompute.whole or (setup.offloads_encoders and work.module.role is Role.encoder):
        return Memory()
    return _saved_head(work, precision, setup)


def _saved_head(work: StageWork, precision: Precision, setup: TrainingSetup) -> Memory:
    if not work.parts()[Part.post]:
        return Memory()
    kept = _kept_bytes(work, Part.post, precision, setup)
    value = precision.value_bytes
    logits = work.items * count_logits_bytes(work.module, work.layout.tp, value) / work.layout.cp
    copies = (setup.loss_copies - 1) * logits * 4 / (value + 4)
    return Memory(activations=kept - logits, logits=logits + copies)


def _workspace_bytes(work: StageWork, precision: Precision, setup: TrainingSetup) -> float:
    """What is there for a moment: the fp32 gradient of a layer's largest matrix before it is added to its bucket, a
    layer (or a whole unit) that is computed again, and what libraries keep."""
    module = work.module
    width = max(module.ffn_hidden_size if not module.num_experts else 0, module.dense_ffn_size)
    matrix = module.hidden_size * width * (2 if module.gated else 1) / work.layout.tp
    passing = 0.0 if module.frozen else precision.gradient_bytes * matrix
    if work.recompute is Recompute.full:
        layers = [_kept_bytes(work, Part.layer, precision, setup, dense) for dense, _ in work.layers_by_mlp]
        passing += max(layers, default=0.0)
    if work.recompute is Recompute.whole:
        graph = _saved(work, precision, setup) + _saved_head(work, precision, setup)
        passing += graph.total / work.layout.vpp
    return precision.library_bytes + passing


def _passed_bytes(work: StageWork, precision: Precision) -> float:
    """Hidden states of a unit that enter a stage (the first has items in their place), and rows that leave the last."""
    module = work.module
    entering = module.input_size * _hidden_bytes(work, precision) / module.hidden_size
    if not work.first:
        entering = _hidden_bytes(work, precision)
    leaving = module.output_size * _hidden_bytes(work, precision) / module.hidden_size if work.last else 0.0
    return entering + leaving


def _hidden_bytes(work: StageWork, precision: Precision) -> float:
    """Hidden states [tokens, items, hidden_size] of a unit on one rank."""
    module = work.module
    return precision.value_bytes * work.items * module.tokens_per_item * module.hidden_size / work.hidden_split


def _kept_bytes(
    work: StageWork, part: Part, precision: Precision, setup: TrainingSetup, dense: bool | None = None
) -> float:
    """What the forward of a part keeps of a unit, unless it is recomputed as a whole."""
    each = count_activation_bytes(
        work.module,
        part,
        work.layout.tp,
        value_bytes=precision.value_bytes,
        fused_attention=precision.fused_attention,
        recomputed=setup.recomputed if work.recompute is Recompute.selective else frozenset(),
        split=work.sequence_parallel,
        dropout=setup.dropout,
        dense=dense,
        product_bytes=precision.product_bytes,
    )
    return work.items * each / work.layout.cp


def worst_moment(combinations: Sequence[Sequence[int]], memory: Sequence[LaneMemory]) -> Memory:
    """A rank's peak, by what holds the bytes: what its lanes always hold, the worst of the combinations of live units
    (one count for each lane) that it meets, and a workspace."""
    unit_bytes = [lane.unit_bytes for lane in memory]
    worst = max(combinations, key=lambda live: _alive(live, unit_bytes))
    alive = add_up(lane.unit.times(n) for n, lane in zip(worst, memory) if n)
    workspace = Memory(workspace=max(lane.workspace_bytes for lane in memory))
    return add_up(lane.static for lane in memory) + alive + workspace


def peak_bytes(combinations: Sequence[Sequence[int]], memory: Sequence[LaneMemory]) -> float:
    """The sum of `worst_moment`, and cheaper."""
    unit_bytes = [lane.unit_bytes for lane in memory]
    return (
        sum(lane.static_bytes for lane in memory)
        + max(_alive(live, unit_bytes) for live in combinations)
        + max(lane.workspace_bytes for lane in memory)
    )


def footprint_bytes(lane: LaneMemory) -> float:
    """What an action of the lane comes back to: parameters, their gradients, and a unit's activations."""
    return lane.static.parameters + lane.static.gradients + lane.unit_bytes


def _alive(live_units: Sequence[int], unit_bytes: Sequence[float]) -> float:
    return sum(n * size for n, size in zip(live_units, unit_bytes))


def add_up(parts: Iterable[Memory]) -> Memory:
    """Their sum."""
    return reduce(Memory.__add__, parts, Memory())
