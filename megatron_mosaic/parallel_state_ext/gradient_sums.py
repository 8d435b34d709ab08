"""Sums of gradients over data-parallel ranks: one collective for all that is summed over the same ranks.

vision buckets --+
llm    buckets --+--> ranks 0-3: one collective        a bucket group waits for the collective that carries it
audio  buckets -----> ranks 2 3: one
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup


class JoinedBuckets:
    """Bucket groups of several stages, all summed over the same ranks in the same dtype."""

    def __init__(self, ranks: dist.ProcessGroup, members: Sequence[BucketGroup]) -> None:
        self._members = members
        buckets = [bucket for member in members for bucket in member.buckets]
        self._joined = BucketGroup(buckets, members[0].ddp_config, ranks, ranks.size())

    def start(self, *, whole: bool) -> None:
        """Begin the sum; DistributedDataParallel's `finish_grad_sync` waits. `whole`: every rank gets all of it."""
        self._joined.start_grad_sync(force_all_reduce=whole)
        work, self._joined.grad_reduce_handle = self._joined.grad_reduce_handle, None
        for member in self._members:
            member.grad_reduce_handle = work  # to wait again for what has ended is no error


def join_buckets(stages: Iterable[DistributedDataParallel]) -> list[JoinedBuckets]:
    """The stages' gradients by the ranks they are summed over.

    Same order on every rank of a group, if `stages` are in the plan's order: a group's ranks run the same of them.
    """
    found: dict[tuple[dist.ProcessGroup, torch.dtype], list[BucketGroup]] = {}
    for stage in stages:
        for member in stage.bucket_groups + stage.expert_parallel_bucket_groups:
            sharded = member.ddp_config.use_distributed_optimizer
            ranks = member.intra_distributed_optimizer_instance_group if sharded else member.data_parallel_group
            found.setdefault((ranks, member.buckets[0].grad_data.dtype), []).append(member)
    return [JoinedBuckets(ranks, members) for (ranks, _), members in found.items()]
