"""Seconds of the collectives inside a stage's layers that nothing hides: tensor, context and expert parallelism."""

from __future__ import annotations

from megatron_mosaic.cost_model.effects.comm import RingComm
from megatron_mosaic.cost_model.effects.kernels import Gemm, attention_gemms, core_s, gemm_s, layer_work, mlp_gemms
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.work import StageWork, of_kind
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.cluster import GpuType
from megatron_mosaic.plan.training import Dispatcher, TrainingSetup
from megatron_mosaic.schedules.actions import Kind


class LayerComm:
    """Of one GPU type, set-up and network. Measured compute has its collectives inside already: it needs none."""

    def __init__(self, gpu: GpuType, comm: RingComm, setup: TrainingSetup, value_bytes: int) -> None:
        self.gpu, self.comm, self.setup, self.value_bytes = gpu, comm, setup, value_bytes

    def estimate(self, work: StageWork, kind: Kind) -> float:
        """Of one unit. `times`: a backward goes twice through layers that it computes again."""
        shares = {Recompute.full: self.setup.full_recompute_frac, Recompute.whole: 1.0}
        times = of_kind({Kind.F: 1.0, Kind.B: 1 + shares.get(work.recompute, 0.0)}, kind)
        if kind is not Kind.F and not work.reaches_layers:
            return self.estimate(work, Kind.F) if work.recompute is Recompute.whole else 0.0
        return (
            self._tensor_s(work, kind, times)
            + work.layers * self._ring_s(work, kind, times)
            + work.expert_layers * self._experts_s(work, times)
        )

    def _tensor_s(self, work: StageWork, kind: Kind, times: float) -> float:
        """Two all-reduces of [tokens, items, hidden] per layer and direction (Shoeybi et al. 2019, section 3), or
        reduce-scatters and all-gathers of the same bytes under sequence parallelism.

        A mixture of whole experts (etp 1) has the one of its attention, unless a shared expert is split. Where experts
        are split, their ranks gather every copy of their tokens, and scatter what they made of them.
        """
        if work.layout.tp == 1:
            return 0.0
        config = work.module
        num_bytes = work.tokens * config.hidden_size * self.value_bytes
        exposed = 1 - self.setup.tp_overlap_frac
        count = 2 * work.layers - (0 if config.shared_expert_size else work.expert_layers)
        seconds = count * self.comm.estimate(Operation.all_reduce, work.groups.tp, num_bytes)
        if work.layout.etp > 1:
            copies = config.moe_top_k * num_bytes * work.layout.etp / work.layout.tp
            group = Group.on_one_node(work.layout.etp) if work.groups.tp.nodes == 1 else work.groups.tp
            seconds += work.expert_layers * self.comm.estimate(Operation.all_reduce, group, copies)
        return exposed * (times * seconds + self._gathered_again_s(work, kind, num_bytes))

    def _gathered_again_s(self, work: StageWork, kind: Kind, num_bytes: float) -> float:
        """Sequence parallelism keeps a part of a split matrix's input; its backward gathers all of it for the matrix's
        gradient while the input's is computed (Korthikanti et al. 2022, section 4.2.2). What that does not hide."""
        if kind is Kind.F or not work.sequence_parallel or work.module.frozen:
            return 0.0
        config, tp = work.module, work.layout.tp
        gather_s = self.comm.estimate(Operation.all_gather, work.groups.tp, num_bytes)
        exposed_s = 0.0
        for dense, count in work.layers_by_mlp:
            inputs = [attention_gemms(config, work.tokens, tp)[0]]
            inputs += mlp_gemms(config, work.tokens, tp, work.layout.ep, dense)[:1] if dense else []
            for g in inputs:
                meanwhile_s = gemm_s(self.gpu, Gemm(g.m, g.k, g.n), self.gpu.num_sms, self.setup.format)
                exposed_s += count * max(0.0, gather_s - meanwhile_s)
        return exposed_s

    def _ring_s(self, work: StageWork, kind: Kind, times: float) -> float:
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

    def _experts_s(self, work: StageWork, times: float) -> float:
        """Of a layer with experts: tokens go to them and come back."""
        config, group = work.module, work.groups.ep
        if work.layout.ep == 1:
            return 0.0
        num_bytes = work.tokens / work.layout.tp * config.hidden_size * self.value_bytes
        if self.setup.expert_dispatcher is Dispatcher.alltoall:
            crossing_s = self.comm.estimate(Operation.all_to_all, group, config.moe_top_k * num_bytes)
        else:
            crossing_s = self._deduplicated_s(group, config.moe_top_k, num_bytes)
        return times * 2 * crossing_s * (1 - self.setup.expert_overlap_frac)

    def _deduplicated_s(self, group: Group, top_k: int, num_bytes: float) -> float:
        """A token goes once to every node that has experts of its choice, and from there once to each of their ranks
        (DeepSeek-V3, 2024, section 3.2.2)."""
        hop = Group.on_one_node(group.fewest)
        if group.nodes == 1:
            return self.comm.estimate(Operation.all_to_all, group, _distinct(group.size, top_k) * num_bytes)
        across = Group(group.nodes, group.nodes, 1)
        across_s = self.comm.estimate(Operation.all_to_all, across, _distinct(group.nodes, top_k) * num_bytes)
        return across_s + self.comm.estimate(Operation.all_to_all, hop, _distinct(group.size, top_k) * num_bytes)


def _distinct(places: int, choices: int) -> float:
    """Expected number of different places among so many even choices: a token goes once to every node or rank."""
    return float(places * (1 - (1 - 1 / places) ** choices))
