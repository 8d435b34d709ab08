"""All messages of one rank: hidden states inside a module, rows and their gradients between modules.

    stage 0 <--hidden--> stage 1 ... last stage --rows of an edge--> stage 0 of the next module
                                                <--their gradients--

What a message holds follows from the step's metadata alone (StepMap), so sizes are never negotiated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.channels.hidden_channel import HiddenChannel
from megatron_mosaic.parallel_state_ext.boundaries.channels.incoming import Arrival
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import Place, RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.items import Shard
from megatron_mosaic.parallel_state_ext.boundaries.step_map import StepMap
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound.cpu import device, to_device
from megatron_mosaic.plan.workload import Workload


class Channels:
    """What the messages of all steps go through, on one rank: a channel for each edge and direction, and pipeline."""

    def __init__(self, view: RankView, workload: Workload, grids: Grids, dtype: torch.dtype) -> None:
        self.view, self.workload, self.dtype = view, workload, dtype
        hidden = {name: module for name, module in view.modules.items() if module.neighbours}
        self._hidden = {
            name: HiddenChannel(module, grids, dtype=dtype, device=device()) for name, module in hidden.items()
        }
        widths = {(edge.source, edge.target): edge.width for edge in view.edges}
        here = [end for module in view.modules.values() for end in (*module.imports, *module.exports)]
        self._rows = {
            sender: RowChannel(
                grids.boundary_groups(sender.module, sender.opposite.module),
                width=widths[sender.source, sender.target],
                dtype=dtype,
                device=device(),
            )
            for sender in dict.fromkeys(side for end in here for side in (end, end.opposite))
            if sender.is_source or sender.source in workload.has_backward
        }

    def rows_from(self, sender: EdgeEnd) -> RowChannel:
        """The channel of rows that leave this end: forward from a source, gradients from a target."""
        return self._rows[sender]

    def hidden(self, module: str) -> HiddenChannel:
        """The channel between the module's stages."""
        return self._hidden[module]

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Module -> bytes of rows, and of gradients of rows, that have left it for other ranks since the start."""
        found: dict[str, float] = dict.fromkeys(self.view.modules, 0.0)
        for sender, rows in self._rows.items():
            found[sender.module] = found.get(sender.module, 0.0) + rows.sent_bytes
        return found

    def drain(self) -> None:
        """Wait until everything posted has left."""
        for rows in self._rows.values():
            rows.drain()
        for hidden in self._hidden.values():
            hidden.drain()


class Exchange:
    """Messages of one rank in one step. Sends never wait; receives do.

    Whatever comes is expected first, in the order in which its sender makes it: `expect_rows`, `expect_hidden`.
    """

    def __init__(self, channels: Channels, step_map: StepMap) -> None:
        self._channels, self._map, self._modules = channels, step_map, channels.view.modules
        self._workload, self._dtype = channels.workload, channels.dtype
        self._arrivals: dict[tuple[EdgeEnd, int], Arrival] = {}

    def finish(self) -> None:
        """Wait until everything posted has left."""
        assert not self._arrivals, f"rows nobody took: {[*self._arrivals]}"
        self._channels.drain()

    # -- rows between modules ------------------------------------------------------------------------------------

    def receive_imports(self, module: str, unit: int) -> tuple[dict[str, Tensor], dict[str, Place]]:
        """producer -> rows of this rank's shard (often none of them), and where they go."""
        ends = {end.opposite.module: end for end in self._modules[module].imports}
        imports = {producer: self._receive(end, unit) for producer, end in ends.items()}
        return imports, {producer: self._place(end, unit) for producer, end in ends.items()}

    def export_places(self, module: str, unit: int) -> dict[str, Place]:
        """consumer -> where the rows it reads stand in the last stage's hidden states."""
        return {end.opposite.module: self._place(end, unit) for end in self._modules[module].exports}

    def send_exports(self, module: str, unit: int, exports: Mapping[str, Tensor]) -> None:
        """Post the rows to every consumer's units."""
        for end in self._modules[module].exports:
            self._send(end, unit, exports[end.opposite.module].to(self._dtype))

    def receive_export_gradients(self, module: str, unit: int) -> dict[str, Tensor]:
        """consumer -> gradients of the rows that it read."""
        return {end.opposite.module: self._receive(end, unit) for end in self._modules[module].exports}

    def send_import_gradients(self, module: str, unit: int, imports: Mapping[str, Tensor]) -> None:
        """Post the gradients of imported rows to their producers; zeros where a row was not used."""
        for end in self._modules[module].imports:
            producer = end.opposite.module
            if producer in self._workload.has_backward:
                rows = imports[producer]
                self._send(end, unit, torch.zeros_like(rows) if rows.grad is None else rows.grad)

    def _send(self, end: EdgeEnd, unit: int, rows: Tensor) -> None:
        for peer in self._map.peers(end, unit):
            parts, marks = self._map.sends(end, unit, peer), self._map.marks_sent(end, unit, peer)
            self._channels.rows_from(end).send(end.in_order(unit, peer), parts, rows, marks)

    def expect_rows(self, end: EdgeEnd, unit: int, peer: int) -> None:
        """Rows (at the target) or gradients (at the source) of `unit` that the other end's unit `peer` makes."""
        channel = self._channels.rows_from(end.opposite)
        if (end, unit) not in self._arrivals:
            self._arrivals[end, unit] = channel.begin(len(self._map.rows(end, unit)))
        parts, marks = self._map.receives(end, unit, peer), self._map.marks_received(end, unit, peer)
        channel.expect(self._arrivals[end, unit], end.in_order(unit, peer), parts, marks)

    def _receive(self, end: EdgeEnd, unit: int) -> Tensor:
        return self._channels.rows_from(end.opposite).take(self._arrivals.pop((end, unit)))

    def _place(self, end: EdgeEnd, unit: int) -> Place:
        held = self._map.rows(end, unit)
        return to_device(torch.as_tensor(held.tokens)), to_device(torch.as_tensor(held.items))

    # -- hidden states inside a module ---------------------------------------------------------------------------

    def send_hidden(self, module: str, unit: int, chunk: int, hidden: Tensor, *, towards: int) -> None:
        """Post hidden states of this (virtual) stage to the next one (+1), or gradients to the one before (-1)."""
        arrives_at = (unit, self._modules[module].chunk_of_neighbour(chunk, towards))
        mark = self._map.hidden_mark(module, *arrives_at)
        self._channels.hidden(module).send(hidden, arrives_at, towards=towards, mark=mark)

    def expect_hidden(self, module: str, unit: int, chunk: int, shard: Shard, *, origin: int) -> None:
        """Hidden states of this rank's shard, from the stage before (-1), or gradients of them from that after (+1)."""
        shape = (len(shard.tokens), len(shard.items), self._workload.by_name[module].hidden_size)
        mark = self._map.hidden_mark(module, unit, chunk)
        self._channels.hidden(module).expect(shape, (unit, chunk), origin=origin, mark=mark)

    def receive_hidden(self, module: str, unit: int, chunk: int, *, origin: int) -> Tensor:
        """[tokens, items, hidden_size], as expected."""
        return self._channels.hidden(module).take((unit, chunk), origin=origin)
