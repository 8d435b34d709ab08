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

from megatron_mosaic.parallel_state_ext.rebound.grad_handles import Waitable, give_handle, take_handle


class SharedWork:
    """A collective that carries several bucket groups: the first to wait for it does, the others find it done.

    Waiting twice would be wrong: gloo copies what a reduce-scatter brought to its place at every wait, over what may
    have been added there since.
    """

    def __init__(self, work: Waitable) -> None:
        self._left = [work]

    def wait(self) -> None:
        while self._left:
            self._left.pop().wait()


class JoinedBuckets:
    """Bucket groups of several stages, all summed over the same ranks in the same dtype."""

    def __init__(self, ranks: dist.ProcessGroup, members: Sequence[BucketGroup]) -> None:
        self._members = members
        buckets = [bucket for member in members for bucket in member.buckets]
        self._joined = BucketGroup(buckets, members[0].ddp_config, ranks, ranks.size())

    def start(self) -> None:
        """Begin the sum; DistributedDataParallel's `finish_grad_sync` waits."""
        self._joined.start_grad_sync()
        work = SharedWork(take_handle(self._joined))
        for member in self._members:
            give_handle(member, work)


def join_buckets(stages: Iterable[DistributedDataParallel]) -> list[JoinedBuckets]:
    """The stages' gradients by the ranks they are summed over.

    Same order on every rank of a group, if `stages` are in the plan's order: a group's ranks run the same of them.
    """
    found: dict[tuple[dist.ProcessGroup, torch.dtype, BucketGroup | None], list[BucketGroup]] = {}
    for stage in stages:
        for member in stage.bucket_groups + stage.expert_parallel_bucket_groups:
            config = member.ddp_config
            sharded = config.use_distributed_optimizer
            ranks = member.intra_distributed_optimizer_instance_group if sharded else member.data_parallel_group
            alone = member if config.reduce_scatter_with_fp32_accumulation else None  # takes one bucket at a time
            found.setdefault((ranks, member.buckets[0].grad_data.dtype, alone), []).append(member)
    return [JoinedBuckets(ranks, members) for (ranks, *_), members in found.items()]
