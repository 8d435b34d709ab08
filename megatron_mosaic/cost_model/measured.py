"""Costs from a profile: what was measured on this machine, whose ranks share its cores."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mosaic.cost_model.effects.comm import MeasuredComm
from megatron_mosaic.cost_model.effects.compute import MeasuredCompute
from megatron_mosaic.cost_model.effects.memory import precision_of
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import Operation, Profile, require_finite
from megatron_mosaic.cost_model.machine import SharedCores
from megatron_mosaic.cost_model.source import ActionCost
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.training import Format, TrainingSetup
from megatron_mosaic.schedules.actions import Kind

MEASURED = TrainingSetup(format=Format.fp32, fused_attention=False)  # what `mosaic calibrate` runs
_CONSENSUS_BYTES = 64  # a handful of fp64 sums


class MeasuredCosts:
    """A `CostSource`: lines through the points of a profile. ProfileError where there are none."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        fitted = FittedProfile(profile)
        self.setup, self.precision, self.overheads = MEASURED, precision_of(MEASURED), profile.overheads
        self.name = profile.title
        self.comm = MeasuredComm(fitted)
        self._cores = cluster.shared_cores
        self._compute = MeasuredCompute(fitted, cluster.gpu.num_sms)
        self._optimizer = fitted.optimizer()

    def action_cost(self, work: StageWork, kind: Kind) -> ActionCost:
        """`CostSource.action_cost`: collectives of the layers are in what was measured."""
        return ActionCost(compute_s=require_finite(work.module.name, self._compute.estimate(work, kind)), comm_s=0.0)

    def threads(self, work: StageWork) -> int:
        """`CostSource.threads`."""
        return self._compute.threads(work.share)

    def machine(self, threads: Sequence[int]) -> SharedCores:
        """`CostSource.machine`."""
        return SharedCores(cores=self._cores, threads=tuple(threads))

    def optimizer_s(self, num_parameters: float) -> float:
        """`CostSource.optimizer_s`."""
        return self._optimizer.at(num_parameters) if num_parameters else 0.0

    def consensus_s(self, world: Group) -> float:
        """A small all-reduce."""
        return self.comm.estimate(Operation.all_reduce, world, _CONSENSUS_BYTES)
