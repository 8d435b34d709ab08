"""How a step is trained beyond what a plan says: number formats, sharding of the optimizer, overlap, fusion."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from megatron_mosaic.plan.yaml_text import Schema


class Format(StrEnum):
    """Number format of the matrix products. fp32: what CPUs train in, parameters and all."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    fp8 = "fp8"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"

    @property
    def is_low(self) -> bool:
        return self in (Format.fp8, Format.mxfp8, Format.nvfp4)


class Sharding(StrEnum):
    """What data-parallel ranks split among themselves (ZeRO, Rajbhandari et al. 2020)."""

    none = "none"
    optimizer = "optimizer"  # stage 1, Megatron's distributed optimizer
    gradients = "gradients"  # stage 2
    parameters = "parameters"  # stage 3, FSDP


class Dispatcher(StrEnum):
    """How tokens go to their experts (`--moe-token-dispatcher-type`)."""

    alltoall = "alltoall"  # a copy for every expert, straight to its rank
    flex = "flex"  # DeepEP: once to every node, there on to the ranks


class Recomputed(StrEnum):
    """Parts of a layer that selective recomputation computes again (`--recompute-modules`)."""

    core_attn = "core_attn"
    layernorm = "layernorm"
    mlp = "mlp"  # of a layer without experts
    moe_act = "moe_act"  # activation functions of the experts
    moe = "moe"
    op = "op"  # torchtitan's: everything but attention and every second matrix product


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """The defaults are the planner's: bf16, fused attention, nothing sharded, nothing overlapped."""

    format: Format = Format.bf16
    sharding: Sharding = Sharding.none
    fused_attention: bool = True
    dropout: bool = False  # its masks are kept, its kernels take time
    gradient_overlap_frac: float = 0.0  # of the backward passes, what hides gradient traffic
    tp_overlap_frac: float = 0.0  # of the tp traffic that hides behind matrix products
    expert_overlap_frac: float = 0.0  # of the all-to-alls
    expert_dispatcher: Dispatcher = Dispatcher.alltoall
    cuda_graphs: bool = False  # layers are launched as a whole
    gradient_format: Format = Format.fp32  # of the buffer that gradients are added in, and of their traffic
    optimizer_shards: int = 0  # ranks that share one (`--num-distributed-optimizer-instances`); 0: all replicas
    # fp32 copies of the logits that the loss has at once: Megatron's one, `--cross-entropy-loss-fusion` two, torch's
    # three (the logits, their logarithmic softmax, the gradient)
    loss_copies: int = 1
    recomputed: frozenset[Recomputed] = frozenset({Recomputed.core_attn})  # where a module's recomputation is selective
    full_recompute_frac: float = 1.0  # of a stage's layers, those that full recomputation is about
    scatters_messages: bool = False  # between pipeline stages each tp rank sends a part: Megatron until 2022
    offloads_encoders: bool = False  # activations of encoders wait in the host's memory


DEFAULT_SETUP = TrainingSetup()

Share = Annotated[float, Field(ge=0, le=1)]


class TrainingOverrides(Schema):
    """`workload.training` in overrides. `format` left out: what the cluster's kind trains in."""

    format: Format | None = None
    sharding: Sharding = Sharding.none
    gradient_overlap_frac: Share = 0.0
    tp_overlap_frac: Share = 0.0
    expert_overlap_frac: Share = 0.0
    expert_dispatcher: Dispatcher = Dispatcher.alltoall
    cuda_graphs: bool = False


class TrainingSection(TrainingOverrides):
    """`training` in a plan."""

    format: Format = Format.bf16
