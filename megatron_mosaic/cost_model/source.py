"""Where seconds come from: a profile of this machine, or formulas of a GPU type. Chosen once, in `build_cost_source`.

StageWork --CostSource--> ActionCost, seconds of collectives and of the tail, and how ranks share what they compute on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_mosaic.cost_model.clock.machine import Machine, OwnDevices, SharedCores
from megatron_mosaic.cost_model.effects.comm import CommModel, MeasuredComm, RingComm
from megatron_mosaic.cost_model.effects.compute import BF16_BYTES, AnalyticCompute, MeasuredCompute, moved_bytes
from megatron_mosaic.cost_model.effects.interference import Interference
from megatron_mosaic.cost_model.effects.kernels import stream_s
from megatron_mosaic.cost_model.effects.layer_comm import LayerComm
from megatron_mosaic.cost_model.effects.memory import Precision, precision_of
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import CALIBRATE, Operation, Overheads, Profile, require_finite
from megatron_mosaic.cost_model.work import StageWork, of_kind
from megatron_mosaic.errors import ProfileError
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.training import Format, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules.actions import Kind

MEASURED = TrainingSetup(format=Format.fp32, fused_attention=False)  # what `mosaic calibrate` runs
_CONSENSUS_BYTES = 64  # a handful of fp64 sums


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionCost:
    """Seconds that one action keeps its ranks busy, by cause.

    `comm_s`: what collectives in its layers add; nothing where the host's launches take longer anyway.
    """

    compute_s: float
    comm_s: float

    @property
    def busy_s(self) -> float:
        return self.compute_s + self.comm_s


class CostSource(Protocol):
    """Predicts what StageWork and a few numbers of the step cost. Deterministic, no I/O."""

    @property
    def name(self) -> str:
        """For `predicted.cost_model`."""

    @property
    def setup(self) -> TrainingSetup: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def comm(self) -> CommModel: ...

    @property
    def overheads(self) -> Overheads: ...

    def action_cost(self, work: StageWork, kind: Kind) -> ActionCost:
        """Of one full unit, through all virtual stages of the stage."""

    def threads(self, work: StageWork) -> int:
        """Cores that a rank computes on: 1 on a GPU, where nobody else's device is touched."""

    def machine(self, threads: Sequence[int]) -> Machine:
        """What ranks compute on: an action of class i of dp slots, on all of them together, uses `threads[i]`."""

    @property
    def interference(self) -> Interference:
        """Constants of a rank's device, on which tracks slow each other down."""

    def moved_bytes(self, work: StageWork, kind: Kind) -> float:
        """That an action of one full unit reads and writes, through all virtual stages of the stage."""

    def host_s(self, work: StageWork, kind: Kind) -> float:
        """And the seconds in it that the host spends on launches."""

    def optimizer_s(self, num_parameters: float) -> float:
        """Of a rank's optimizer step over so many parameters."""

    def consensus_s(self, world: Group) -> float:
        """In which all ranks agree on a few numbers."""


class AnalyticCosts:
    """A `CostSource`: what `effects/` says of a GPU type, each rank with its own. ConfigError for a format whose peak
    nobody knows."""

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

    @property
    def interference(self) -> Interference:
        """`CostSource.interference`: of the bandwidth that the cost model's own kernels reach."""
        gpu = self._gpu
        return Interference(
            bandwidth_bytes_per_s=gpu.memory_bytes_per_s * gpu.bandwidth_frac,
            residual=gpu.interference_residual,
            serial_frac=1.0,  # one host thread launches for all lanes, in the schedule's order
            is_measured="interference_residual" in gpu.sources,
        )

    def moved_bytes(self, work: StageWork, kind: Kind) -> float:
        """`CostSource.moved_bytes`."""
        return moved_bytes(work, kind, self.setup, BF16_BYTES)

    def host_s(self, work: StageWork, kind: Kind) -> float:
        """`CostSource.host_s`."""
        return self._compute.launch_s(work, kind)

    def optimizer_s(self, num_parameters: float) -> float:
        """Its memory traffic: Adam reads gradient, fp32 copy and both moments and writes all but the gradient, and the
        bf16 parameter: 4*4 + 3*4 + 2 = 30 bytes per parameter."""
        return stream_s(self._gpu, 30 * num_parameters, self._gpu.num_sms)

    def consensus_s(self, world: Group) -> float:
        """A tree of messages up and down."""
        link = self._cluster.intra if world.nodes == 1 else self._cluster.inter
        return 2 * (world.size - 1).bit_length() * link.latency_s


class MeasuredCosts:
    """A `CostSource`: lines through what was measured on this machine, whose ranks share its cores. ProfileError where
    there are no points."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        fitted = FittedProfile(profile)
        self.setup, self.precision, self.overheads = MEASURED, precision_of(MEASURED), profile.overheads
        self.name = profile.title
        self.comm = MeasuredComm(fitted)
        self._all_cores = SharedCores(
            cores=cluster.shared_cores,
            threads=(),
            slow_downs=tuple((point.ranks, point.slow_down) for point in profile.crowding),
        )
        self._compute = MeasuredCompute(fitted, cluster.gpu.num_sms, self._all_cores)
        self._optimizer = fitted.optimizer()
        found = profile.interference
        self._layer_host_s = found.layer_host_s if found else 0.0
        self.interference = interference_of(profile, cluster.num_ranks)

    def action_cost(self, work: StageWork, kind: Kind) -> ActionCost:
        """`CostSource.action_cost`: collectives of the layers are in what was measured."""
        return ActionCost(compute_s=require_finite(work.module.name, self._compute.estimate(work, kind)), comm_s=0.0)

    def threads(self, work: StageWork) -> int:
        """`CostSource.threads`."""
        return self._compute.threads(work)

    def machine(self, threads: Sequence[int]) -> SharedCores:
        """`CostSource.machine`."""
        return replace(self._all_cores, threads=tuple(threads))

    def moved_bytes(self, work: StageWork, kind: Kind) -> float:
        """`CostSource.moved_bytes`, of fp32 values."""
        return moved_bytes(work, kind, self.setup, self.precision.value_bytes)

    def host_s(self, work: StageWork, kind: Kind) -> float:
        """`CostSource.host_s`: a backward launches twice what a forward does."""
        return self._layer_host_s * work.layers * of_kind({Kind.F: 1 / 3, Kind.B: 2 / 3}, kind)

    def optimizer_s(self, num_parameters: float) -> float:
        """`CostSource.optimizer_s`."""
        return self._optimizer.at(num_parameters) if num_parameters else 0.0

    def consensus_s(self, world: Group) -> float:
        """A small all-reduce."""
        return self.comm.estimate(Operation.all_reduce, world, _CONSENSUS_BYTES)


def interference_of(profile: Profile, num_ranks: int) -> Interference:
    """Constants of a rank's part of this machine."""
    bandwidth, found = profile.machine.memory_bytes_per_s / num_ranks, profile.interference
    if found is None:
        return Interference(bandwidth_bytes_per_s=bandwidth)
    return Interference(
        bandwidth_bytes_per_s=bandwidth,
        residual=found.residual,
        serial_frac=found.serial_frac,
        cache_bytes=found.cache_bytes,
        is_measured=True,
    )


def build_cost_source(
    workload: Workload, cluster: Cluster, profile: Profile | None, setup: TrainingSetup
) -> CostSource:
    """Measured where the cluster shares its cores (this machine: its set-up is the measured one), else analytic.

    ProfileError unless the profile that is needed is this workload's.
    """
    if not cluster.shared_cores:
        return AnalyticCosts(cluster, setup)
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
    return MeasuredCosts(cluster, profile)
