"""Seconds of the collectives inside a stage's layers that nothing hides: tensor, context and expert parallelism."""

from __future__ import annotations

from megatron_mosaic.cost_model.effects.comm import RingComm
from megatron_mosaic.cost_model.effects.kernels import core_s, layer_work
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.work import StageWork, of_kind
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.cluster import GpuType
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.schedules.actions import Kind


class LayerComm:
    """Of one GPU type, set-up and network. Measured compute has its collectives inside already: it needs none."""

    def __init__(self, gpu: GpuType, comm: RingComm, setup: TrainingSetup, value_bytes: int) -> None:
        self.gpu, self.comm, self.setup, self.value_bytes = gpu, comm, setup, value_bytes

    def estimate(self, work: StageWork, kind: Kind) -> float:
        """Of one unit. `times`: a backward with full recomputation goes through its layers twice."""
        times = of_kind({Kind.F: 1, Kind.B: 2 if work.recompute is Recompute.full else 1}, kind)
        if kind is not Kind.F and not work.reaches_layers:
            return 0.0
        return (
            self._tensor_s(work, times)
            + work.layers * self._ring_s(work, kind, times)
            + work.expert_layers * self._experts_s(work, times)
        )

    def _tensor_s(self, work: StageWork, times: int) -> float:
        """Two all-reduces of [tokens, items, hidden] per layer and direction (Shoeybi et al. 2019, section 3).

        A mixture of whole experts (etp 1) has the one of its attention, unless a shared expert is split.
        """
        if work.layout.tp == 1:
            return 0.0
        config = work.module
        num_bytes = work.tokens * config.hidden_size * self.value_bytes
        exposed = 1 - self.setup.tp_overlap_frac
        alone = work.layout.etp == 1 and not config.shared_expert_size
        count = 2 * work.layers - work.expert_layers * alone
        all_reduce_s = self.comm.estimate(Operation.all_reduce, work.groups.tp, num_bytes)
        return exposed * times * count * all_reduce_s

    def _ring_s(self, work: StageWork, kind: Kind, times: int) -> float:
        """Of a layer. Keys and values travel around the cp ring while attention computes on those that are here (Liu,
        Zaharia, Abbeel 2023): what attention does not hide is counted."""
        config, layout = work.module, work.layout
        if layout.cp == 1:
            return 0.0
        width = 2 * config.query_groups * config.head_size / layout.tp
        num_bytes = layout.cp * work.tokens * width * self.value_bytes
        ring_s = self.comm.estimate(Operation.all_gather, work.groups.cp, num_bytes)
        kernels = layer_work(
            config,
            work.items,
            layout.tp,
            layout.cp,
            layout.ep,
            work.sequence_parallel,
            not config.num_experts,
            self.setup,
        )
        hidden_s = core_s(self.gpu, kernels, self.gpu.num_sms)
        forward_s, backward_s = max(0.0, ring_s - hidden_s), max(0.0, 2 * ring_s - 2.5 * hidden_s)
        return of_kind({Kind.F: forward_s, Kind.B: backward_s + (times - 1) * forward_s}, kind)

    def _experts_s(self, work: StageWork, times: int) -> float:
        """Of a layer with experts: tokens go to them and come back."""
        config, group = work.module, work.groups.ep
        if work.layout.ep == 1:
            return 0.0
        copies = _distinct(group.nodes if group.nodes > 1 else work.layout.ep, config.moe_top_k)
        num_bytes = work.tokens / work.layout.tp * copies * config.hidden_size * self.value_bytes
        crossing_s = self.comm.estimate(Operation.all_to_all, group, num_bytes)
        return times * 2 * crossing_s * (1 - self.setup.expert_overlap_frac)


def _distinct(places: int, choices: int) -> float:
    """Expected number of different places among so many even choices: a token goes once to every node or rank."""
    return float(places * (1 - (1 - 1 / places) ** choices))
