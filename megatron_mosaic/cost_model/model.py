"""Time and memory of a plan's pieces: what the simulator adds up. Deterministic, no I/O.

Workload --sizes--> FLOPs, bytes --+
GpuType  --------- compute --------+--> ActionCost (compute, tp communication), transfers, step tail, bytes
Profile  --------- comm -----------+
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_mosaic.cost_model.effects.boundary_traffic import boundary_traffic
from megatron_mosaic.cost_model.effects.comm import CommModel, MeasuredComm, RingComm
from megatron_mosaic.cost_model.effects.compute import AnalyticCompute, ComputeModel, MeasuredCompute, StageWork
from megatron_mosaic.cost_model.effects.kernels import core_s, layer_work, stream_s
from megatron_mosaic.cost_model.effects.memory import (
    ANALYTIC,
    FP32,
    LaneMemory,
    estimate_lane,
    items_of_action,
    precision_of,
    shards_of,
    stage_expert_parameters,
    trained_parameters,
)
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import CALIBRATE, Operation, Profile, require_finite
from megatron_mosaic.errors import ProfileError
from megatron_mosaic.plan import Plan, Recompute
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.training import DEFAULT_SETUP, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules.passes import stage_ranks

_CONSENSUS_BYTES = 64  # a handful of fp64 sums


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionCost:
    """Seconds that one action keeps its ranks busy, by cause. `threads`: cores it computes on, per rank.

    `tp_comm_s`: what collectives add; nothing where the host's launches take longer anyway.
    """

    compute_s: float
    tp_comm_s: float
    threads: int

    @property
    def busy_s(self) -> float:
        return self.compute_s + self.tp_comm_s


class CostModel:
    """Predicts with a profile where the cluster shares its cores (this machine), analytically elsewhere."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        profile: Profile | None = None,
        setup: TrainingSetup = DEFAULT_SETUP,
    ) -> None:
        self.setup = setup
        self.workload, self.cluster, self.profile = workload, cluster, profile
        compute: ComputeModel
        comm: CommModel
        if cluster.shared_cores:
            if profile is None:
                raise ProfileError(
                    f"cluster {cluster.name!r}", got="no profile", expected="a profile of this machine", fix=CALIBRATE
                )
            if profile.workload != workload.name or profile.digest != workload.digest:
                raise ProfileError(
                    "profile: digest",
                    got=f"{profile.workload} {profile.digest}",
                    expected=f"{workload.name} {workload.digest}, the workload to plan",
                    fix=f"{CALIBRATE} for this model",
                )
            fitted = FittedProfile(profile)
            compute, comm, self.precision = (
                MeasuredCompute(fitted, cluster.gpu.num_sms),
                MeasuredComm(fitted),
                FP32,
            )
            self._optimizer = fitted.optimizer()
        else:
            compute, comm, self.precision = (
                AnalyticCompute(cluster.gpu, setup),
                RingComm(cluster),
                precision_of(setup),
            )
        self.compute, self.comm = compute, comm
        self._actions: dict[tuple[object, ...], ActionCost] = {}
        self.lane_costs: dict[tuple[object, ...], Any] = {}  # memory of price.py

    @property
    def name(self) -> str:
        """For `predicted.cost_model`."""
        measured = self.profile is not None and self.cluster.shared_cores
        return self.profile.title if self.profile and measured else f"{self.cluster.gpu.name}, {ANALYTIC}"

    def items_of_action(self, plan: Plan, module: str) -> int:
        """Items that the busiest DP lane of a module takes in one full unit."""
        return items_of_action(plan, self.workload, module)

    def action_cost(self, plan: Plan, module: str, stage: int, *, backward: bool) -> ActionCost:
        """Cost of one full unit of a stage, forward or backward."""
        placed = plan.modules[module]
        layout, items = placed.layout, self.items_of_action(plan, module)
        first, last = stage == 0, stage == layout.pp - 1
        tp_ranks = self._tp_ranks(plan, module, stage)
        others = stage_ranks(plan, module, stage)[: max(layout.tp * layout.cp, layout.ep * layout.etp)]
        share, recompute = placed.quota.share, placed.recompute
        key = (
            module,
            layout.tp,
            layout.cp,
            layout.ep,
            layout.etp,
            placed.sequence_parallel,
            layout.pp,
            items,
            first,
            last,
            backward,
            share,
            recompute,
            self._nodes(tp_ranks),
            self._nodes(others),
        )
        if key not in self._actions:
            config = self.workload.by_name[module]
            work = StageWork(
                module=config,
                tp=layout.tp,
                layers=config.num_layers // layout.pp,
                first=first,
                last=last,
                items=items,
                backward=backward,
                recompute=recompute,
                share=share,
                cp=layout.cp,
                ep=layout.ep,
                split=placed.sequence_parallel,
                reaches_layers=self.workload.hidden_has_gradient(module),
            )
            comm_s = 0.0
            if work.reaches_layers or not backward:
                comm_s = self._tp_comm_s(work, tp_ranks, layout.etp) + self._other_comm_s(plan, module, stage, work)
            compute_s = require_finite(f"{module}.{stage}", self.compute.estimate(work))
            self._actions[key] = ActionCost(
                compute_s=compute_s,
                tp_comm_s=self.compute.estimate(work, comm_s) - compute_s if comm_s else 0.0,
                threads=self.compute.threads(share),
            )
        return self._actions[key]

    def transfer_s(self, plan: Plan, source: tuple[str, int], target: tuple[str, int]) -> float:
        """Seconds from the end of an action to the start of the one that needs its result, on other ranks.

        (module, stage) of both ends. Inside a module: a stage's output [tokens, items, hidden] per DP lane. Between
        modules: the rows of the edge, or their gradients, that the busiest rank sends or receives.
        """
        ranks = tuple(stage_ranks(plan, *source)), tuple(stage_ranks(plan, *target))
        if source[0] == target[0]:
            module = self.workload.by_name[source[0]]
            placed = plan.modules[source[0]]
            # between nodes each tp rank sends its part, put together over NVLink (Narayanan et al. 2021, section 4.1)
            far = self.cluster.link_between((ranks[0][0], ranks[1][0])) is not self.cluster.intra
            split = placed.layout.cp * (placed.layout.tp if placed.sequence_parallel or far else 1)
            width = module.tokens_per_item * module.hidden_size / split
            hidden_bytes = self.items_of_action(plan, source[0]) * width * self.precision.value_bytes
            return self.comm.estimate(Operation.p2p, (ranks[0][0], ranks[1][0]), hidden_bytes)
        forward = next((e for e in self.workload.edges if (e.source, e.target) == (source[0], target[0])), None)
        edge = forward or next(e for e in self.workload.edges if (e.target, e.source) == (source[0], target[0]))
        traffic = boundary_traffic(plan.modules[edge.source], plan.modules[edge.target])
        if not traffic.busiest_frac:
            return 0.0  # every rank already holds its rows
        carrier = self.workload.items_of(edge)
        items = self.items_of_action(plan, carrier) * plan.modules[carrier].layout.dp
        num_bytes = traffic.busiest_frac * items * edge.rows_per_item * edge.width * self.precision.value_bytes
        low, high = traffic.crosses
        return self.comm.estimate(Operation.p2p, (low, high), num_bytes) if high > low else 0.0

    def gradient_sync_s(self, plan: Plan, module: str, stage: int) -> float:
        """Seconds to all-reduce a stage's gradients over its DP group, after its last backward."""
        config, placed = self.workload.by_name[module], plan.modules[module]
        layout = placed.layout
        experts = 0.0 if config.frozen else stage_expert_parameters(config, placed)
        dense = trained_parameters(config, placed, stage) - experts
        units = -(
            -plan.num_microbatches(self.workload.backbone.name) // plan.units(self.workload.backbone.name)[module]
        )
        ranks = stage_ranks(plan, module, stage)
        seconds = 0.0
        for parameters, group in (
            (dense, tuple(ranks[:: layout.tp])),
            (experts, tuple(ranks[:: min(len(ranks), layout.ep * layout.etp)])),
        ):
            gradient_bytes = self.precision.gradient_bytes * parameters
            if self.setup.sharding is Sharding.none:
                seconds += self.comm.estimate(Operation.all_reduce, group, gradient_bytes)
                continue
            scattered = self.comm.estimate(Operation.reduce_scatter, group, gradient_bytes)
            gathered = self.comm.estimate(Operation.all_gather, group, self.precision.value_bytes * parameters)
            seconds += scattered + gathered
            if self.setup.sharding is Sharding.parameters:  # gathered for every forward and every backward
                seconds += (units - 1) * (scattered + 2 * gathered) + gathered
        return seconds

    def optimizer_s(self, num_parameters: float) -> float:
        """Seconds of an optimizer step over a rank's trained parameters: measured, else its memory traffic.

        Analytic, of the shard that a rank updates: Adam reads gradient, fp32 copy and both
        moments and writes all but the gradient, and the bf16 parameter: 4*4 + 3*4 + 2 = 30 bytes per parameter.
        """
        if not num_parameters:
            return 0.0
        if self.cluster.shared_cores:
            return self._optimizer.at(num_parameters)
        return stream_s(self.cluster.gpu, 30 * num_parameters, self.cluster.gpu.num_sms)

    def consensus_s(self, plan: Plan) -> float:
        """Seconds in which all ranks agree on a few numbers: measured, else a tree of messages up and down."""
        if self.cluster.shared_cores:
            return self.comm.estimate(Operation.all_reduce, tuple(range(plan.world_size)), _CONSENSUS_BYTES)
        hops = (plan.world_size - 1).bit_length()
        return 2 * hops * self.cluster.link_between((0, plan.world_size - 1)).latency_s

    def trained_parameters(self, plan: Plan, module: str, stage: int) -> float:
        """Parameters whose optimizer step a rank computes: its shard where the optimizer is sharded."""
        config, placed = self.workload.by_name[module], plan.modules[module]
        dense, expert = (1, 1) if self.setup.sharding is Sharding.none else shards_of(placed.layout)
        experts = 0.0 if config.frozen else stage_expert_parameters(config, placed)
        return (trained_parameters(config, placed, stage) - experts) / dense + experts / expert

    def lane_memory(self, plan: Plan, module: str, stage: int) -> LaneMemory:
        """What a stage holds on one rank."""
        items = self.items_of_action(plan, module)
        return estimate_lane(
            self.workload.by_name[module], plan.modules[module], stage, items, self.precision, self.setup
        )

    def _tp_ranks(self, plan: Plan, module: str, stage: int) -> tuple[int, ...]:
        """The tp group that crosses nodes if any does, else the first one."""
        ranks, tp = stage_ranks(plan, module, stage), plan.modules[module].layout.tp
        return _worst_group(ranks, tp, self.cluster.gpus_per_node)

    def _nodes(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Node of each rank, counted from the first's: what collectives of these ranks depend on."""
        first = self.cluster.node_of(ranks[0])
        return tuple(self.cluster.node_of(rank) - first for rank in ranks)

    def _tp_comm_s(self, work: StageWork, ranks: tuple[int, ...], etp: int) -> float:
        """Two all-reduces of [tokens, items, hidden] per layer and direction (Shoeybi et al. 2019, section 3).

        A mixture of whole experts (etp 1) has the one of its attention, unless a shared expert is split. Measured
        compute has them inside already.
        """
        if self.cluster.shared_cores or len(ranks) == 1:
            return 0.0
        num_bytes = (
            work.items * work.module.tokens_per_item / work.cp * work.module.hidden_size * self.precision.value_bytes
        )
        repeats = 2 if work.backward and work.recompute is Recompute.full else 1
        exposed = 1 - self.setup.tp_overlap_frac
        config = work.module
        sparse_frac = 1 - config.num_dense_layers / config.num_layers if config.num_experts else 0.0
        each = 2 - sparse_frac * (etp == 1 and not config.shared_expert_size)
        return exposed * repeats * each * work.layers * self.comm.estimate(Operation.all_reduce, ranks, num_bytes)

    def _other_comm_s(self, plan: Plan, module: str, stage: int, work: StageWork) -> float:
        """Exposed seconds of context-parallel keys and values and of expert all-to-alls.

        Keys and values travel around the cp ring while attention computes on those that are here (Liu, Zaharia,
        Abbeel 2023): what attention does not hide is counted. Tokens go to their experts and come back.
        """
        if self.cluster.shared_cores or work.cp == work.ep == 1:
            return 0.0
        config, layout, setup = work.module, plan.modules[module].layout, self.setup
        ranks = stage_ranks(plan, module, stage)
        tokens = work.items * config.tokens_per_item / work.cp
        again = work.backward and work.recompute is Recompute.full
        seconds = 0.0
        if work.cp > 1:
            group = tuple(ranks[: layout.tp * layout.cp : layout.tp])
            width = 2 * config.query_groups * config.head_size / work.tp
            ring_s = self.comm.estimate(
                Operation.all_gather, group, work.cp * tokens * width * self.precision.value_bytes
            )
            kernels = layer_work(
                config, work.items, work.tp, work.cp, work.ep, work.split, not config.num_experts, setup
            )
            hidden_s = core_s(self.cluster.gpu, kernels, self.cluster.gpu.num_sms)
            forward_s, backward_s = max(0.0, ring_s - hidden_s), max(0.0, 2 * ring_s - 2.5 * hidden_s)
            seconds += backward_s + again * forward_s if work.backward else forward_s
        if work.ep > 1:
            group = tuple(ranks[: layout.ep * layout.etp])
            nodes = len({self.cluster.node_of(rank) for rank in group})
            copies = _distinct(nodes if nodes > 1 else work.ep, config.moe_top_k)
            num_bytes = tokens / work.tp * copies * config.hidden_size * self.precision.value_bytes
            crossing = self.comm.estimate(Operation.all_to_all, group, num_bytes)
            sparse_frac = 1 - config.num_dense_layers / config.num_layers
            seconds += (1 + again) * 2 * crossing * sparse_frac * (1 - setup.expert_overlap_frac)
        return work.layers * seconds


def _distinct(places: int, choices: int) -> float:
    """Expected number of different places among so many even choices: a token goes once to every node or rank."""
    return float(places * (1 - (1 - 1 / places) ** choices))


@lru_cache(maxsize=4096)
def _worst_group(ranks: tuple[int, ...], size: int, gpus_per_node: int) -> tuple[int, ...]:
    """Of consecutive groups of this size: the first that crosses nodes, else the first."""
    groups = (ranks[start : start + size] for start in range(0, len(ranks), size))
    crossing = (group for group in groups if group[0] // gpus_per_node != group[-1] // gpus_per_node)
    return next(crossing, ranks[:size])


def memory_limit_bytes(cluster: Cluster, memory_frac: float) -> float:
    """What a rank may use of its device."""
    return memory_frac * cluster.gpu.memory_bytes
