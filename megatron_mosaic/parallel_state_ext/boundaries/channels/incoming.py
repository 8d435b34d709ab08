"""Messages that are expected and not here yet, by sender, and the rows of a unit that come in several of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import require_same
from megatron_mosaic.parallel_state_ext.boundaries.routes import Part


class Mailbox:
    """What comes from one rank in one group, in the order in which it is expected, which is that of its sender.

    A plain message is received from the moment that it is expected. One with a fingerprint waits in `_unread` until it,
    or a later one, is taken: its fingerprint comes first, and a message of another length would end the process.
    """

    def __init__(self, sender: int, group: dist.ProcessGroup) -> None:
        """`sender`: global rank."""
        self._sender, self._group = sender, group
        self._unread: deque[tuple[Incoming, int]] = deque()

    def expect(self, buffer: Tensor, mark: int | None = None) -> Incoming:
        """A message that will be in `buffer`, which nobody else touches before. Goes on at once."""
        message = Incoming(buffer, self._sender, self)
        if mark is None:
            message.post(self._group)
        else:
            self._unread.append((message, mark))
        return message

    def read_until(self, message: Incoming) -> None:
        """Receive messages with fingerprints up to this one. BatchError where another fingerprint than theirs comes."""
        while not message.is_posted:
            first, mark = self._unread.popleft()
            header = torch.empty(1, dtype=torch.int64, device=first.buffer.device)
            dist.recv(header, src=self._sender, group=self._group)
            require_same(int(header), mark, self._sender, dist.get_rank())
            first.post(self._group)


class Incoming:
    """A message. `sender`: global rank, also for those who look where this rank stands. `_work`: once it is posted."""

    def __init__(self, buffer: Tensor, sender: int, mailbox: Mailbox) -> None:
        self.buffer, self.sender, self._mailbox = buffer, sender, mailbox
        self._work: dist.Work | None = None

    @property
    def is_posted(self) -> bool:
        """Whether its receive is."""
        return self._work is not None

    def post(self, group: dist.ProcessGroup) -> None:
        """Receive it, and go on."""
        self._work = dist.irecv(self.buffer, src=self.sender, group=group)

    def take(self) -> Tensor:
        """Wait for it. BatchError where its fingerprint, or that of one before it, is not the expected one."""
        self._mailbox.read_until(self)
        assert self._work is not None, f"rank {dist.get_rank()} is not in the group of a message from {self.sender}"
        self._work.wait()
        return self.buffer


@dataclass(frozen=True)
class Arrival:
    """Rows of one unit while they come.

    `kept`: parts of this rank's own; `messages`: parts of other ranks, each in its place of `rows`, or beside it where
    it is no slice of them.
    """

    num_rows: int
    make_rows: Callable[[], Tensor]
    kept: list[tuple[Hashable, Part]] = field(default_factory=list)
    messages: list[tuple[Incoming, Part]] = field(default_factory=list)

    @cached_property
    def rows(self) -> Tensor:
        """[num_rows, width], made when the first message needs it."""
        return self.make_rows()
