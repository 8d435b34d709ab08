"""The hand-over of rows between two modules' layouts: forward, and backward as its exact adjoint.

One `RowChannel` per direction. The producer's action posts its rows and goes on; the consumer's rank expects them as
soon as the schedule says that it may, and its action waits for them. Rows that stay on their rank are handed over by
reference, and never copied where a rank keeps all of them.

    forward   source groups --StepMap.sends/receives--> target groups   a row once to every rank that reads it
    backward  target groups --the same, sides swapped-> source groups   its gradient once to every maker

Why the adjoint is a route and not a sum: a target group's replicas (tensor parallel) all hold the *full* gradient of
their rows, so one replica speaks for the group; a row read through several links is summed by its producer's autograd.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.channels.incoming import Arrival, Mailbox
from megatron_mosaic.parallel_state_ext.boundaries.routes import Part, Rows
from megatron_mosaic.parallel_state_ext.rebound.cpu import to_device

Place = tuple[Tensor, Tensor]  # of each row: (index along the token dim, index along the item dim) of hidden states


class RowChannel:
    """Rows of one edge in one direction, `width` values each. `sent_bytes` counts what left for other ranks.

    Sender and receiver may be lanes that run at the same time: what both touch is behind `_lock`.
    """

    def __init__(
        self,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`groups`: for messages to higher ranks, and to lower ranks."""
        (self._up, self._down), self._rank = groups, dist.get_rank()
        self._width, self._dtype, self._device = width, dtype, device
        self._lock = threading.RLock()
        self._kept: dict[Hashable, Tensor] = {}
        self._outbox: list[tuple[dist.Work, Tensor, bool]] = []
        self._spare: list[Tensor] = []  # staging buffers of what leaves
        self._mailboxes: dict[int, Mailbox] = {}  # by sender
        self.sent_bytes = 0

    def send(self, key: Hashable, parts: Sequence[Part], rows: Tensor, marks: Sequence[int] = ()) -> None:
        """Post this rank's parts of `rows` [rows, width]; never waits. `key` names the pair of units.

        `marks`: a fingerprint of each part, which then goes before it (and is asked for: see `Mailbox`).

        gloo calls a message delivered only when it is waited for: there, buffers are free again after `drain`.
        """
        rows = rows.detach()
        self._collect()
        for index, part in enumerate(parts):
            if part.rank == self._rank:
                self._kept[key] = rows[_index(part.rows, rows.device)]
                continue
            group = self._up if part.rank > self._rank else self._down
            if marks:
                header = torch.tensor([marks[index]], dtype=torch.int64, device=self._device)
                self._outbox.append((dist.isend(header, dst=part.rank, group=group), header, False))
            staged = not isinstance(part.rows, slice)
            if staged:
                buffer = self._take(part.num_rows)
                torch.index_select(rows, 0, _index(part.rows, rows.device), out=buffer)
            else:
                buffer = rows[part.rows].contiguous()
            self.sent_bytes += buffer.numel() * buffer.element_size()
            self._outbox.append((dist.isend(buffer, dst=part.rank, group=group), buffer, staged))

    def begin(self, num_rows: int) -> Arrival:
        """A unit's rows, of which nothing is expected yet."""
        return Arrival(num_rows, lambda: self._empty(num_rows))

    def expect(self, arrival: Arrival, key: Hashable, parts: Sequence[Part], marks: Sequence[int] = ()) -> None:
        """Receive from now on what comes under `key` to a unit. Its own rows are only noted.

        `marks`: the fingerprints of the parts, which are asked for when the rows are taken.
        """
        for index, part in enumerate(parts):
            if part.rank == self._rank:
                arrival.kept.append((key, part))
                continue
            buffer = arrival.rows[part.rows] if isinstance(part.rows, slice) else self._empty(part.num_rows)
            message = self._mailbox(part.rank).expect(buffer, marks[index] if marks else None)
            arrival.messages.append((message, part))

    def take(self, arrival: Arrival) -> Tensor:
        """All of a unit's rows, [num_rows, width]. Waits for them. BatchError where another fingerprint comes."""
        if not arrival.messages and len(arrival.kept) == 1:
            key, part = arrival.kept[0]
            if part.num_rows == arrival.num_rows:
                return self._take_kept(key)
        rows = arrival.rows
        for key, part in arrival.kept:
            rows[_index(part.rows, rows.device)] = self._take_kept(key)
        for message, part in arrival.messages:
            buffer = message.take()
            if not isinstance(part.rows, slice):
                rows[_index(part.rows, rows.device)] = buffer
        return rows

    def drain(self) -> None:
        """Wait until every posted message has left."""
        self._collect(wait=True)
        assert not self._kept, f"rows nobody took: {list(self._kept)}"

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging buffers that are free; messages that fit use them again."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._spare)

    def _collect(self, *, wait: bool = False) -> None:
        """Forget messages that have left; their staging buffers are free again."""
        with self._lock:
            posted = self._outbox[:]
            self._outbox.clear()
            for work, buffer, staged in posted:
                if wait:
                    work.wait()
                elif not work.is_completed():
                    self._outbox.append((work, buffer, staged))
                    continue
                if staged:
                    self._give(buffer)

    def _empty(self, num_rows: int) -> Tensor:
        return torch.empty(num_rows, self._width, dtype=self._dtype, device=self._device)

    def _mailbox(self, sender: int) -> Mailbox:
        if sender not in self._mailboxes:
            self._mailboxes[sender] = Mailbox(sender, self._up if sender < self._rank else self._down)
        return self._mailboxes[sender]

    def _take_kept(self, key: Hashable) -> Tensor:
        """Rows that stayed on this rank. Another lane's stream made them: its memory waits until this one is done."""
        rows = self._kept.pop(key)
        if rows.is_cuda:
            rows.record_stream(torch.cuda.current_stream(rows.device))
        return rows

    def _take(self, num_rows: int) -> Tensor:
        """[num_rows, width] of the smallest buffer that fits; where none does, a new one takes the place of a spare."""
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._spare) if len(buffer) >= num_rows]
            if fitting:
                return self._spare.pop(min(fitting, key=lambda i: len(self._spare[i])))[:num_rows]
            if self._spare:
                self._spare.pop(min(range(len(self._spare)), key=lambda i: len(self._spare[i])))
        return self._empty(num_rows)

    def _give(self, buffer: Tensor) -> None:
        """Take back what `_take` gave: never more buffers than messages were under way at once."""
        with self._lock:
            self._spare.append(buffer if buffer._base is None else buffer._base)


def _index(rows: Rows, device: torch.device) -> slice | Tensor:
    return rows if isinstance(rows, slice) else to_device(torch.as_tensor(rows), device)
