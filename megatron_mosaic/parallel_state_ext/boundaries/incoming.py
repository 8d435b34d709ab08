"""A message whose receive is posted, and the rows of a unit that come in several of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import require_same
from megatron_mosaic.parallel_state_ext.boundaries.routes import Part


@dataclass(frozen=True, slots=True)
class Incoming:
    """`buffer` is what comes once `take` has returned; nobody else touches it before. `sender`: global rank."""

    buffer: Tensor
    sender: int
    work: dist.Work

    @classmethod
    def post(cls, buffer: Tensor, sender: int, group: dist.ProcessGroup) -> Incoming:
        """Expect it, and go on. Messages of one sender and group come in the order in which they are expected."""
        work = dist.irecv(buffer, src=sender, group=group)
        assert work is not None, f"rank {dist.get_rank()} is not in the group of a message from rank {sender}"
        return cls(buffer, sender, work)

    def take(self) -> Tensor:
        """Wait for it."""
        self.work.wait()
        return self.buffer


@dataclass(frozen=True)
class Arrival:
    """Rows of one unit while they come. `expected`: the keys of all that is posted.

    `kept`: parts of this rank's own; `messages`: parts of other ranks, and whether they come through a staging buffer.
    """

    num_rows: int
    make_rows: Callable[[], Tensor]
    expected: set[Hashable] = field(default_factory=set)
    kept: list[tuple[Hashable, Part]] = field(default_factory=list)
    messages: list[tuple[Incoming, Part, bool]] = field(default_factory=list)

    @cached_property
    def rows(self) -> Tensor:
        """[num_rows, width], made when the first message needs it."""
        return self.make_rows()


def take_mark(expected: int, sender: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Wait for the fingerprint that goes before a message. BatchError unless it is the expected one."""
    header = Incoming.post(torch.empty(1, dtype=torch.int64, device=device), sender, group).take()
    require_same(int(header), expected, sender, dist.get_rank())
