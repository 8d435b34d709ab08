"""Seconds of one stage of one module: from a profile, or from FLOPs and bytes on a GPU type.

Backward costs two forwards (gradients of inputs and of weights); a frozen module has no weight gradients.
Recomputation adds the forward it repeats: the whole layer (full) or its attention core (selective).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_mosaic.cost_model.effects.kernels import (
    Gemm,
    Work,
    backward_s,
    core_s,
    flops_per_s,
    forward_s,
    gemm_s,
    layer_work,
)
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.cluster import GpuType
from megatron_mosaic.plan.quota import grant_quota
from megatron_mosaic.plan.training import DEFAULT_SETUP, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig

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
    cp: int = 1
    ep: int = 1
    split: bool = False  # sequence parallelism
    reaches_layers: bool = True  # the backward: else it ends at the trained projector of a frozen module

    @property
    def parts(self) -> tuple[tuple[Part, int], ...]:
        """(part, how often)."""
        within = self.reaches_layers or not self.backward
        return (
            (Part.pre, int(self.first and within)),
            (Part.layer, self.layers * within),
            (Part.post, int(self.last)),
        )


class ComputeModel(Protocol):
    """Predicts seconds of a stage's work, without waiting for anyone outside the tp group."""

    def estimate(self, work: StageWork, comm_s: float = 0.0) -> float:
        """With `comm_s` of collectives in its layers."""

    def threads(self, share: float) -> int:
        """Cores that a rank computes on with this share (1 on a GPU: nobody else's device is touched)."""


class AnalyticCompute:
    """Kernel by kernel, as `kernels.py` says."""

    def __init__(self, gpu: GpuType, setup: TrainingSetup = DEFAULT_SETUP) -> None:
        self.gpu, self.setup = gpu, setup
        flops_per_s(gpu, setup.format)  # refuses a format whose peak nobody knows

    def threads(self, share: float) -> int:
        return 1

    def estimate(self, work: StageWork, comm_s: float = 0.0) -> float:
        gpu, module, setup = self.gpu, work.module, self.setup
        sms = grant_quota(work.share, gpu.num_sms, gpu.sm_granularity)
        if work.backward and not work.reaches_layers:
            head = Gemm(module.hidden_size, module.output_size, work.items * module.tokens_per_item / work.cp)
            return gemm_s(gpu, head, sms, setup.format, 8) if work.last else 0.0
        seconds = 0.0
        for kernels, count in self._parts(work):
            is_layer = kernels.core_flops + kernels.core_bytes > 0
            layer_comm_s = comm_s / work.layers if is_layer else 0.0
            if not work.backward:
                seconds += count * forward_s(gpu, kernels, sms, setup, layer_comm_s)
                continue
            again = work.recompute is Recompute.full and is_layer  # its collectives are in comm_s too
            each_comm_s = layer_comm_s / 2 if again else layer_comm_s
            each = backward_s(gpu, kernels, sms, setup, trained=not module.frozen, comm_s=each_comm_s)
            if again:
                each += forward_s(gpu, kernels, sms, setup, each_comm_s)
            elif work.recompute is Recompute.selective:
                each += core_s(gpu, kernels, sms)
            seconds += count * each
        return seconds

    def _parts(self, work: StageWork) -> list[tuple[Work, float]]:
        module, tp = work.module, work.tp
        dense_frac = module.num_dense_layers / module.num_layers if module.num_experts else 1.0
        parts = [
            (layer_work(module, work.items, tp, work.cp, work.ep, work.split, dense, self.setup), work.layers * frac)
            for dense, frac in ((True, dense_frac), (False, 1 - dense_frac))
            if frac
        ]
        tokens = work.items * module.tokens_per_item / work.cp
        h = module.hidden_size
        if work.first:
            gemms = (Gemm(tokens, h, module.input_size),) if module.input_size else ()
            parts.append((Work(gemms, BF16_BYTES * 3 * tokens * h, 4), 1.0))
        if work.last:
            widths = [width for width in (module.vocab_size / tp, module.output_size) if width]
            # logits are read and written by the loss in fp32: cast, maximum, exponential, sum
            moved = tokens * (4 * h + 16 * module.vocab_size / tp)
            parts.append((Work(tuple(Gemm(tokens, width, h) for width in widths), moved, 10), 1.0))
        return parts


class MeasuredCompute:
    """Fitted lines of a profile. Communication inside the tp group is in them.

    A tp group that was measured with more threads than cores was slowed down by itself; that factor is taken out,
    because the simulator puts the slow-down of shared cores in.
    """

    def __init__(self, fitted: FittedProfile, cores_per_rank: int) -> None:
        self.fitted, self.cores_per_rank = fitted, cores_per_rank

    def threads(self, share: float) -> int:
        return grant_quota(share, self.cores_per_rank, 1)

    def estimate(self, work: StageWork, comm_s: float = 0.0) -> float:
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
