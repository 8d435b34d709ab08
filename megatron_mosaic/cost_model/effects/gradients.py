"""Seconds of the collectives that add a stage's gradients up, after its last backward."""

from __future__ import annotations

from megatron_mosaic.cost_model.effects.comm import CommModel
from megatron_mosaic.cost_model.effects.memory import Precision
from megatron_mosaic.cost_model.effects.parameters import trained_parameters
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan.training import Sharding, TrainingSetup


def gradient_sync_s(work: StageWork, comm: CommModel, precision: Precision, setup: TrainingSetup) -> float:
    """Over the ranks that hold the same dense parameters, then over those with the same experts."""
    seconds = 0.0
    for parameters, group in zip(trained_parameters(work), (work.groups.dp, work.groups.expert_dp)):
        gradient_bytes = precision.gradient_bytes * parameters
        if setup.sharding is Sharding.none:
            seconds += comm.estimate(Operation.all_reduce, group, gradient_bytes)
            continue
        scattered = comm.estimate(Operation.reduce_scatter, group, gradient_bytes)
        gathered = comm.estimate(Operation.all_gather, group, precision.value_bytes * parameters)
        seconds += scattered + gathered
        if setup.sharding is Sharding.parameters:  # gathered for every forward and every backward
            seconds += (work.num_units - 1) * (scattered + 2 * gathered) + gathered
    return seconds
