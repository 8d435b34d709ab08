"""Seconds of one action of a stage: from a profile, or from FLOPs and bytes on a GPU type.

Backward costs two forwards (gradients of inputs and of weights); a frozen module has no weight gradients.
Recomputation adds the forward it repeats: the whole layer (full) or its attention core (selective).
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mosaic.cost_model.clock.machine import Machine
from megatron_mosaic.cost_model.effects.kernels import (
    BACKWARD_LAUNCHES,
    Gemm,
    Work,
    backward_bytes,
    backward_s,
    core_s,
    flops_per_s,
    forward_bytes,
    forward_s,
    gemm_s,
    head_gemms,
    launches_s,
    layer_work,
    projector_gemms,
    stream_s,
)
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.work import StageWork, of_kind
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.cluster import GpuType
from megatron_mosaic.plan.quota import grant_cores, grant_quota, grant_shares
from megatron_mosaic.plan.training import DEFAULT_SETUP, Recomputed, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.schedules.actions import Kind

BF16_BYTES = 2


class AnalyticCompute:
    """Kernel by kernel, as `kernels.py` says."""

    def __init__(self, gpu: GpuType, setup: TrainingSetup = DEFAULT_SETUP) -> None:
        self.gpu, self.setup = gpu, setup
        flops_per_s(gpu, setup.format)  # refuses a format whose peak nobody knows

    def estimate(self, work: StageWork, kind: Kind, comm_s: float = 0.0) -> float:
        """Seconds of a unit with `comm_s` of collectives in its layers."""
        sms = granted_sms(work, self.gpu)
        return of_kind({Kind.F: self._forward_s, Kind.B: self._backward_s}, kind)(work, sms, comm_s)

    def launch_s(self, work: StageWork, kind: Kind) -> float:
        """Of these, what the host spends on launching kernels: see `forward_s` and `backward_s`."""
        parts = parts_of(work, self.setup)
        forward_s = sum(count * launches_s(self.gpu, kernels, self.setup) for kernels, count in parts)
        again = {Recompute.full: self.setup.full_recompute_frac, Recompute.whole: 1.0}.get(work.recompute, 0.0)
        backward_s = (BACKWARD_LAUNCHES * work.reaches_layers + again) * forward_s
        return of_kind({Kind.F: forward_s, Kind.B: backward_s}, kind)

    def _forward_s(self, work: StageWork, sms: int, comm_s: float) -> float:
        seconds = 0.0
        for kernels, count in parts_of(work, self.setup):
            layer_comm_s = comm_s / work.layers if _is_layer(kernels) else 0.0
            seconds += count * forward_s(self.gpu, kernels, sms, self.setup, layer_comm_s)
        return seconds

    def _backward_s(self, work: StageWork, sms: int, comm_s: float) -> float:
        gpu, module, setup = self.gpu, work.module, self.setup
        whole = work.recompute is Recompute.whole
        if not work.reaches_layers:
            forward_again_s = self._forward_s(work, sms, comm_s) if whole else 0.0
            return forward_again_s + (self._projector_backward_s(module, work.tokens, sms) if work.last else 0.0)
        seconds = 0.0
        for kernels, count in parts_of(work, setup):
            layer_comm_s = comm_s / work.layers if _is_layer(kernels) else 0.0
            # of the layers that are recomputed, whose collectives are in comm_s too
            again = setup.full_recompute_frac if work.recompute is Recompute.full and _is_layer(kernels) else 0.0
            again = 1.0 if whole else again
            each_comm_s = layer_comm_s / (1 + again)
            each = backward_s(gpu, kernels, sms, setup, trained=not module.frozen, comm_s=each_comm_s)
            if again:
                each += again * forward_s(gpu, kernels, sms, setup, each_comm_s)
            elif work.recompute is Recompute.selective and _is_layer(kernels):
                each += self._parts_again_s(work, kernels, sms)
            seconds += count * each
        return seconds

    def _parts_again_s(self, work: StageWork, kernels: Work, sms: int) -> float:
        """The forward of the parts of a layer that selective recomputation is about."""
        gpu, setup, parts = self.gpu, self.setup, self.setup.recomputed
        if Recomputed.op in parts:
            products = sum(gemm_s(gpu, gemm, sms, setup.format) for gemm in kernels.gemms)
            return products / 2 + stream_s(gpu, kernels.moved_bytes, sms)
        seconds = core_s(gpu, kernels, sms) if Recomputed.core_attn in parts else 0.0
        if Recomputed.layernorm in parts:
            seconds += stream_s(gpu, kernels.norm_bytes, sms)
        sparse = len(kernels.mlp_gemms) > 2
        if (Recomputed.moe if sparse else Recomputed.mlp) in parts:
            products = sum(gemm_s(gpu, gemm, sms, setup.format) for gemm in kernels.mlp_gemms)
            return seconds + products + stream_s(gpu, kernels.activation_bytes, sms)
        if sparse and Recomputed.moe_act in parts:
            seconds += stream_s(gpu, kernels.activation_bytes, sms)
        return seconds

    def _projector_backward_s(self, module: ModuleConfig, tokens: float, sms: int) -> float:
        """Of a trained projector behind frozen layers: gradients of its matrices, and of what is between the two."""
        products = projector_gemms(module, tokens)
        weights = [gemm_s(self.gpu, Gemm(g.k, g.n, g.m), sms, self.setup.format, 8) for g in products]
        between = [gemm_s(self.gpu, Gemm(g.m, g.k, g.n), sms, self.setup.format) for g in products[1:]]
        return sum(weights) + sum(between)


def granted_sms(work: StageWork, gpu: GpuType) -> int:
    """SMs that a stage computes on: jointly granted with those of the tracks beside it, or its share."""
    if work.track_shares:
        return grant_shares(work.track_shares, gpu.num_sms, gpu.sm_granularity)[work.track]
    return grant_quota(work.share, gpu.num_sms, gpu.sm_granularity)


def parts_of(work: StageWork, setup: TrainingSetup) -> list[tuple[Work, int]]:
    """Kernels of a stage's forward of one unit, part by part, and how often it goes through each."""
    module, layout = work.module, work.layout
    parts = [
        (
            layer_work(
                module,
                work.items,
                layout.tp,
                layout.cp,
                layout.ep,
                work.sequence_parallel,
                dense,
                setup,
                layout.etp,
            ),
            n,
        )
        for dense, n in work.layers_by_mlp
    ]
    tokens, h = work.tokens, module.hidden_size
    if work.first:
        gemms = (Gemm(tokens, h, module.input_size),) if module.input_size else ()
        parts.append((Work(gemms, BF16_BYTES * 3 * tokens * h, 4), 1))
    if work.last:
        # logits are read and written by the loss in fp32: cast, maximum, exponential, sum
        logits = 16 * module.vocab_size / layout.tp * (1 + module.num_mtp_layers)
        parts.append((Work(head_gemms(module, tokens, layout.tp), tokens * (4 * h + logits), 10), 1))
    return parts


def moved_bytes(work: StageWork, kind: Kind, setup: TrainingSetup, value_bytes: int) -> float:
    """What the kernels of a unit's action read and write. ScheduleError for kinds that have no price."""
    parts = parts_of(work, setup)
    forward = sum(count * forward_bytes(kernels) for kernels, count in parts)
    if of_kind({Kind.F: True, Kind.B: False}, kind):
        return value_bytes / 2 * forward
    if work.reaches_layers:
        trained = not work.module.frozen
        backward = sum(count * backward_bytes(kernels, trained=trained) for kernels, count in parts)
    else:
        projector = Work(projector_gemms(work.module, work.tokens) if work.last else (), 0.0, 0)
        backward = backward_bytes(projector, trained=True)
    again = {Recompute.full: setup.full_recompute_frac, Recompute.whole: 1.0}.get(work.recompute, 0.0)
    return value_bytes / 2 * (backward + again * forward)


def _is_layer(kernels: Work) -> bool:
    return kernels.core_flops + kernels.core_bytes > 0


class MeasuredCompute:
    """Fitted lines of a profile. Communication inside the tp group is in them.

    The threads of a tp group slowed each other down while it was measured; that factor is taken out, because the
    simulator puts the slow-down of shared cores in.
    """

    def __init__(self, fitted: FittedProfile, cores_per_rank: int, cores: Machine) -> None:
        self.fitted, self.cores_per_rank, self._cores = fitted, cores_per_rank, cores

    def threads(self, work: StageWork) -> int:
        """Cores that a rank computes on: jointly granted with those of the tracks beside it (a thread each where there
        are fewer cores), or its share."""
        cores, tracks = self.cores_per_rank, work.track_shares
        if not tracks:
            return grant_quota(work.share, cores, 1)
        return grant_cores(tracks, cores)[work.track] if len(tracks) <= cores else 1

    def estimate(self, work: StageWork, kind: Kind) -> float:
        """Seconds of a unit."""
        threads, again = self.threads(work), work.recompute
        alone = 1.0 / self._cores.crowding(work.layout.tp * threads)
        passes = [(kind, work.parts(kind))]
        if of_kind({Kind.F: False, Kind.B: again is not Recompute.none}, kind):
            # nothing finer was measured than a layer
            passes.append((Kind.F, work.parts(Kind.F if again is Recompute.whole else kind)))
        seconds = sum(self._pass_s(work, parts, threads, each) for each, parts in passes)
        return seconds * alone + self.fitted.profile.overheads.action_s

    def _pass_s(self, work: StageWork, parts: Mapping[Part, int], threads: int, kind: Kind) -> float:
        return sum(
            count * self.fitted.module(work.module.name, work.layout.tp, threads, part, kind).at(work.items)
            for part, count in parts.items()
            if count
        )
