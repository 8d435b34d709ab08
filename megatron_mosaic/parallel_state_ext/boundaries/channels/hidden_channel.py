"""The hand-over of hidden states between the stages of one module, and of their gradients the other way.

Between virtual stages of one rank (pp 1) they are handed over by reference.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.channels.incoming import Incoming, Mailbox
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import ModuleView

Place = tuple[int, int]


class HiddenChannel:
    """Messages of one rank of a module with several stages: +1 is the stage after, -1 the stage before. A `place` is
    the unit and the chunk at which one arrives."""

    def __init__(self, module: ModuleView, grids: Grids, *, dtype: torch.dtype, device: torch.device) -> None:
        self._neighbours, self._dtype, self._device = module.neighbours, dtype, device
        self._stays = module.placed.layout.pp == 1
        self._kept: dict[tuple[int, Place], Tensor] = {}  # by the way it goes
        self._groups = {  # by the way that a message goes
            (towards, neighbour.wraps): grids.pipeline_group(module.name, towards, wraps=neighbour.wraps)
            for step, neighbour in module.neighbours.items()
            for towards in (step, -step)
            if not self._stays
        }
        self._mailboxes = {
            origin: Mailbox(neighbour.rank, self._groups[-origin, neighbour.wraps])
            for origin, neighbour in module.neighbours.items()
            if not self._stays
        }
        self._outbox: list[tuple[dist.Work, Tensor]] = []
        self._expected: dict[tuple[int, Place], Incoming] = {}  # by where it comes from

    def send(self, hidden: Tensor, place: Place, *, towards: int, mark: int | None = None) -> None:
        """Post hidden states to the next stage (+1), or their gradients to the one before (-1); never waits.

        `mark`: a fingerprint of whose they are, which then goes before them.
        """
        if self._stays:
            self._kept[towards, place] = hidden.detach()
            return
        buffer = hidden.detach().contiguous()
        self._outbox[:] = [(work, kept) for work, kept in self._outbox if not work.is_completed()]
        neighbour = self._neighbours[towards]
        group = self._groups[towards, neighbour.wraps]
        if mark is not None:
            header = torch.tensor([mark], dtype=torch.int64, device=self._device)
            self._outbox.append((dist.isend(header, dst=neighbour.rank, group=group), header))
        self._outbox.append((dist.isend(buffer, dst=neighbour.rank, group=group), buffer))

    def expect(self, shape: tuple[int, int, int], place: Place, *, origin: int, mark: int | None = None) -> None:
        """Receive from now on [tokens, items, hidden_size] from the stage before (-1) or after (+1).

        `mark`: the fingerprint that goes before it, which is asked for when it is taken.
        """
        if not self._stays:
            buffer = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._expected[origin, place] = self._mailboxes[origin].expect(buffer, mark)

    def take(self, place: Place, *, origin: int) -> Tensor:
        """What was expected there. Waits for it. BatchError where another fingerprint comes."""
        if self._stays:
            return self._kept.pop((-origin, place))
        return self._expected.pop((origin, place)).take()

    def drain(self) -> None:
        """Wait until every posted message has left."""
        for work, _ in self._outbox:
            work.wait()
        self._outbox.clear()
        left = [*self._kept, *self._expected]
        assert not left, f"hidden states nobody took: {left}"
