"""Which part of each parameter a rank's optimizer steps."""

from __future__ import annotations

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import nn


def list_shards(optimizer: MegatronOptimizer) -> dict[nn.Parameter, slice] | None:
    """Parameter -> numbers of it, flat, that this rank steps; those without any are left out. None: all of each.

    Elsewhere the gradient buffer of a distributed optimizer holds what the reduce-scatter left over.
    """
    members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if not any(isinstance(member, DistributedOptimizer) for member in members):
        return None
    shards = {}
    for member in members:
        if member.is_stub_optimizer:  # nothing to step
            continue
        for parameter in member.model_param_group_index_map:
            own = member._get_model_param_range_map(parameter)["param"]
            shards[parameter] = slice(own.start, own.end)
    return shards
