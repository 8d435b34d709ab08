"""The hand-over of rows between two modules' layouts: forward, and backward as its exact adjoint.

One `RowChannel` per direction. The producer's action posts its rows and goes on; the consumer's action waits for
them. Rows that stay on their rank are handed over by reference.

    forward   source lanes --build_route(source, target)--> target lanes   a row once to every rank that reads it
    backward  target lanes --build_route(target, source)--> source lanes   its gradient once to every maker

Why the adjoint is a route and not a sum: a target lane's replicas (tensor parallel) all hold the *full* gradient of
their input, so one replica speaks for the lane; a row read by several modules is summed by the caller, edge by edge.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.routes import Transfer


class RowChannel:
    """Rows of one edge in one direction. `rows_per_item` rows of `width` values belong to each item."""

    def __init__(
        self, group: dist.ProcessGroup, *, rows_per_item: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._group, self._rank = group, dist.get_rank()
        self._item_shape = (rows_per_item, width)
        self._dtype, self._device = dtype, device
        self._kept: dict[Hashable, Tensor] = {}
        self._outbox: list[tuple[dist.Work, Tensor]] = []
        self.sent_bytes = 0

    def send(self, key: Hashable, route: Sequence[Transfer], rows: Tensor) -> None:
        """Post this rank's part of `route`; never waits. `rows`: [items * rows_per_item, width] of its lane's items."""
        items = rows.detach().reshape(-1, *self._item_shape)
        self._outbox = [(work, buffer) for work, buffer in self._outbox if not work.is_completed()]
        for transfer in route:
            if transfer.sender != self._rank:
                continue
            part = _pick(items, transfer.from_positions)
            if transfer.is_local:
                self._kept[key] = part
            else:
                part = part.contiguous()
                self.sent_bytes += part.numel() * part.element_size()
                self._outbox.append((dist.isend(part, dst=transfer.receiver, group=self._group), part))

    def receive(self, key: Hashable, route: Sequence[Transfer], num_items: int) -> Tensor:
        """The rows of this lane's `num_items` items, [num_items * rows_per_item, width]. Waits for them."""
        mine = [transfer for transfer in route if transfer.receiver == self._rank]
        if len(mine) == 1 and mine[0].is_local and len(mine[0].to_positions) == num_items:
            return self._kept.pop(key).reshape(-1, self._item_shape[1])
        items = torch.empty(num_items, *self._item_shape, dtype=self._dtype, device=self._device)
        waiting = []
        for transfer in mine:
            if transfer.is_local:
                _put(items, transfer.to_positions, self._kept.pop(key))
            else:
                buffer = torch.empty(len(transfer.items), *self._item_shape, dtype=self._dtype, device=self._device)
                work = dist.irecv(buffer, src=transfer.sender, group=self._group)
                waiting.append((work, transfer, buffer))
        for work, transfer, buffer in waiting:
            work.wait()
            _put(items, transfer.to_positions, buffer)
        return items.reshape(-1, self._item_shape[1])

    def drain(self) -> None:
        """Wait until every posted message has left."""
        for work, _ in self._outbox:
            work.wait()
        self._outbox.clear()
        assert not self._kept, f"rows nobody took: {list(self._kept)}"


def _is_span(positions: Sequence[int]) -> bool:
    return list(positions) == list(range(positions[0], positions[0] + len(positions)))


def _pick(items: Tensor, positions: Sequence[int]) -> Tensor:
    """A view where the positions are consecutive, else a copy."""
    if _is_span(positions):
        return items[positions[0] : positions[0] + len(positions)]
    return items[torch.tensor(positions, device=items.device)]


def _put(items: Tensor, positions: Sequence[int], values: Tensor) -> None:
    if _is_span(positions):
        items[positions[0] : positions[0] + len(positions)] = values
    else:
        items[torch.tensor(positions, device=items.device)] = values
