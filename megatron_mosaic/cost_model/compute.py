"""Seconds of one stage of one module: from a profile, or from FLOPs and bytes on a GPU type.

Backward costs two forwards (gradients of inputs and of weights); a frozen module has no weight gradients.
Recomputation adds the forward it repeats: the whole layer (full) or its attention core (selective).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_mosaic.cluster import GpuType
from megatron_mosaic.colocation.quota import grant_quota
from megatron_mosaic.cost_model.fit import FittedProfile
from megatron_mosaic.cost_model.profile import Part
from megatron_mosaic.cost_model.sizes import count_attention_flops, count_flops, count_parameters
from megatron_mosaic.plan import Recompute
from megatron_mosaic.workload import ModuleConfig

BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """One action's work on one rank: which parts of a module, for how many items, in which direction."""

    module: ModuleConfig
    tp: int
    layers: int
    first: bool
    last: bool
    items: int
    backward: bool
    recompute: Recompute
    share: float  # of the rank's SMs or cores

    @property
    def parts(self) -> tuple[tuple[Part, int], ...]:
        """(part, how often)."""
        return ((Part.pre, int(self.first)), (Part.layer, self.layers), (Part.post, int(self.last)))


class ComputeModel(Protocol):
    """Predicts seconds of a stage's work, without waiting for anyone outside the tp group."""

    def estimate(self, work: StageWork) -> float: ...

    def threads(self, share: float) -> int:
        """Cores that a rank computes on with this share (1 on a GPU: nobody else's device is touched)."""


class AnalyticCompute:
    """max(FLOPs / reachable FLOP/s, bytes / bandwidth), part by part.

    Bytes: weights once, and each activation of width h or f read and written once per matrix product.
    """

    def __init__(self, gpu: GpuType) -> None:
        self.gpu = gpu

    def threads(self, share: float) -> int:
        return 1

    def estimate(self, work: StageWork) -> float:
        return sum(count * self._part(work, part) for part, count in work.parts if count)

    def _part(self, work: StageWork, part: Part) -> float:
        module = work.module
        flops = work.items * count_flops(module, part) / work.tp
        width = {
            Part.pre: float(module.input_size + module.hidden_size),
            Part.layer: 8 * module.hidden_size + 2 * module.ffn_hidden_size / work.tp,
            Part.post: module.hidden_size + module.vocab_size / work.tp + module.output_size,
        }
        moved = work.items * module.tokens_per_item * width[part]
        num_bytes = BF16_BYTES * (moved + count_parameters(module, part, work.tp))
        forward_s = self._roofline(work.share, flops, num_bytes)
        if not work.backward:
            return forward_s
        seconds = forward_s if module.frozen else 2 * forward_s
        if work.recompute is Recompute.full and part is Part.layer:
            seconds += forward_s
        if work.recompute is Recompute.selective and part is Part.layer:
            seconds += self._roofline(work.share, work.items * count_attention_flops(module) / work.tp, 0)
        return seconds

    def _roofline(self, share: float, flops: float, num_bytes: float) -> float:
        gpu = self.gpu
        granted_frac = grant_quota(share, gpu.num_sms, gpu.sm_granularity) / gpu.num_sms
        return max(
            flops / (gpu.flops_per_s * gpu.gemm_efficiency_frac * granted_frac), num_bytes / gpu.memory_bytes_per_s
        )


class MeasuredCompute:
    """Fitted lines of a profile. Communication inside the tp group is in them.

    A tp group that was measured with more threads than cores was slowed down by itself; that factor is taken out,
    because the simulator puts the slow-down of shared cores in.
    """

    def __init__(self, fitted: FittedProfile, cores_per_rank: int) -> None:
        self.fitted, self.cores_per_rank = fitted, cores_per_rank

    def threads(self, share: float) -> int:
        return grant_quota(share, self.cores_per_rank, 1)

    def estimate(self, work: StageWork) -> float:
        threads = self.threads(work.share)
        alone = min(1.0, self.fitted.profile.machine.cores / (work.tp * threads))
        seconds = self._direction(work, threads, backward=work.backward)
        if work.backward and work.recompute is not Recompute.none:
            seconds += self._direction(work, threads, backward=False)  # no finer measurement than the whole layer
        return seconds * alone + self.fitted.profile.overheads.action_s

    def _direction(self, work: StageWork, threads: int, *, backward: bool) -> float:
        return sum(
            count * self.fitted.module(work.module.name, work.tp, threads, part, backward=backward).at(work.items)
            for part, count in work.parts
            if count
        )
