"""Costs from the formulas of a GPU type: what `effects/` says, put together."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mosaic.cost_model.effects.comm import RingComm
from megatron_mosaic.cost_model.effects.compute import AnalyticCompute
from megatron_mosaic.cost_model.effects.kernels import stream_s
from megatron_mosaic.cost_model.effects.layer_comm import LayerComm
from megatron_mosaic.cost_model.effects.memory import precision_of
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.profile import Overheads, require_finite
from megatron_mosaic.cost_model.machine import OwnDevices
from megatron_mosaic.cost_model.source import ActionCost
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.schedules.actions import Kind


class AnalyticCosts:
    """A `CostSource`: every rank owns its GPU. ConfigError for a format that no GPU type has numbers for."""

    def __init__(self, cluster: Cluster, setup: TrainingSetup) -> None:
        self.setup, self.precision, self.overheads = setup, precision_of(setup), Overheads()
        self.name = f"{cluster.gpu.name}, analytic"
        self.comm = RingComm(cluster)
        self._cluster, self._gpu = cluster, cluster.gpu
        self._compute = AnalyticCompute(cluster.gpu, setup)
        self._layer_comm = LayerComm(cluster.gpu, self.comm, setup, self.precision.value_bytes)

    def action_cost(self, work: StageWork, kind: Kind) -> ActionCost:
        """`CostSource.action_cost`."""
        comm_s = self._layer_comm.estimate(work, kind)
        compute_s = require_finite(work.module.name, self._compute.estimate(work, kind))
        with_comm_s = self._compute.estimate(work, kind, comm_s) if comm_s else compute_s
        return ActionCost(compute_s=compute_s, comm_s=with_comm_s - compute_s)

    def threads(self, work: StageWork) -> int:
        """`CostSource.threads`."""
        return 1

    def machine(self, threads: Sequence[int]) -> OwnDevices:
        """`CostSource.machine`."""
        return OwnDevices()

    def optimizer_s(self, num_parameters: float) -> float:
        """Its memory traffic: Adam reads gradient, fp32 copy and both moments and writes all but the gradient, and the
        bf16 parameter: 4*4 + 3*4 + 2 = 30 bytes per parameter."""
        return stream_s(self._gpu, 30 * num_parameters, self._gpu.num_sms)

    def consensus_s(self, world: Group) -> float:
        """A tree of messages up and down."""
        link = self._cluster.intra if world.nodes == 1 else self._cluster.inter
        return 2 * (world.size - 1).bit_length() * link.latency_s
