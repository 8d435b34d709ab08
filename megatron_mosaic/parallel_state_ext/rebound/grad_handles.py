"""The handle of a gradient sum under way, which a bucket group of Megatron keeps for `finish_grad_sync` to wait for."""

from __future__ import annotations

from typing import Protocol

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup


class Waitable(Protocol):
    """Something that a bucket group can wait for."""

    def wait(self) -> object: ...


def take_handle(group: BucketGroup) -> Waitable:
    """What the group would wait for; it has nothing to wait for any more."""
    handle: Waitable = group.grad_reduce_handle
    group.grad_reduce_handle = None
    return handle


def give_handle(group: BucketGroup, handle: Waitable) -> None:
    """Let the group wait for this."""
    group.grad_reduce_handle = handle
