"""All messages of one rank: hidden states inside a module, rows and their gradients between modules.

    stage 0 <--hidden--> stage 1 ... last stage --rows of an edge--> stage 0 of the next module
                                                <--their gradients--

What a message holds follows from the step's metadata alone (StepMap), so sizes are never negotiated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.items import Shard
from megatron_mosaic.parallel_state_ext.boundaries.row_channel import Place, RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.step_map import StepMap
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rebound.cpu import device
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.layout import coordinates_of, rank_at
from megatron_mosaic.plan.workload import Edge, Workload


class Exchange:
    """Messages of one rank under one plan. Sends never wait; receives do."""

    def __init__(self, plan: Plan, workload: Workload, grids: Grids, dtype: torch.dtype) -> None:
        self._plan, self._workload, self._grids, self._dtype = plan, workload, grids, dtype
        self._at = {name: coordinates_of(plan.modules[name], grids.rank) for name in plan.modules_on(grids.rank)}
        self._forward = {(e.source, e.target): self._channel(e, e.source, e.target) for e in workload.edges}
        self._backward = {
            (e.source, e.target): self._channel(e, e.target, e.source)
            for e in workload.edges
            if e.source in workload.has_backward
        }
        self._outbox: list[tuple[dist.Work, Tensor]] = []
        self._map: StepMap

    def begin_step(self, step_map: StepMap) -> None:
        self._map = step_map

    def finish_step(self) -> None:
        """Wait until everything posted has left."""
        for channel in (*self._forward.values(), *self._backward.values()):
            channel.drain()
        for work, _ in self._outbox:
            work.wait()
        self._outbox.clear()

    # -- rows between modules ------------------------------------------------------------------------------------

    def receive_imports(self, module: str, unit: int) -> tuple[dict[str, Tensor], dict[str, Place]]:
        """producer -> rows of this rank's shard (often none of them), and where they go."""
        imports, places = {}, {}
        for edge in self._workload.edges:
            if edge.target == module:
                held = self._map.rows(edge, unit, at_source=False)
                arrivals = [
                    ((peer, unit), self._map.receives(edge, unit, peer, at_source=False))
                    for peer in self._map.peers(edge, unit, at_source=False)
                ]
                imports[edge.source] = self._forward[edge.source, edge.target].receive(arrivals, len(held))
                places[edge.source] = _place(held.tokens, held.items)
        return imports, places

    def export_places(self, module: str, unit: int) -> dict[str, Place]:
        """consumer -> where the rows it reads stand in the last stage's hidden states."""
        held = {
            edge.target: self._map.rows(edge, unit, at_source=True)
            for edge in self._workload.edges
            if edge.source == module
        }
        return {target: _place(rows.tokens, rows.items) for target, rows in held.items()}

    def send_exports(self, module: str, unit: int, exports: Mapping[str, Tensor]) -> None:
        """Post the rows to every consumer's units."""
        for edge in self._workload.edges:
            if edge.source == module:
                for peer in self._map.peers(edge, unit, at_source=True):
                    parts = self._map.sends(edge, unit, peer, at_source=True)
                    rows = exports[edge.target].to(self._dtype)
                    self._forward[edge.source, edge.target].send((unit, peer), parts, rows)

    def receive_export_gradients(self, module: str, unit: int) -> dict[str, Tensor]:
        """consumer -> gradients of the rows that it read."""
        gradients = {}
        for edge in self._workload.edges:
            if edge.source == module:
                held = self._map.rows(edge, unit, at_source=True)
                arrivals = [
                    ((unit, peer), self._map.receives(edge, unit, peer, at_source=True))
                    for peer in self._map.peers(edge, unit, at_source=True)
                ]
                gradients[edge.target] = self._backward[edge.source, edge.target].receive(arrivals, len(held))
        return gradients

    def send_import_gradients(self, module: str, unit: int, imports: Mapping[str, Tensor]) -> None:
        """Post the gradients of imported rows to their producers; zeros where a row was not used."""
        for edge in self._workload.edges:
            if edge.target != module or edge.source not in self._workload.has_backward:
                continue
            rows = imports[edge.source]
            gradient = torch.zeros_like(rows) if rows.grad is None else rows.grad
            for peer in self._map.peers(edge, unit, at_source=False):
                parts = self._map.sends(edge, unit, peer, at_source=False)
                self._backward[edge.source, edge.target].send((peer, unit), parts, gradient)

    def _channel(self, edge: Edge, sender: str, receiver: str) -> RowChannel:
        groups = self._grids.boundary_groups(sender, receiver)
        return RowChannel(groups, width=edge.width, dtype=self._dtype, device=device())

    # -- hidden states inside a module ---------------------------------------------------------------------------

    def send_hidden(self, module: str, hidden: Tensor, *, towards: int) -> None:
        """Post hidden states to the next stage (+1), or their gradients to the one before (-1)."""
        buffer = hidden.detach().contiguous()
        self._outbox = [(work, kept) for work, kept in self._outbox if not work.is_completed()]
        neighbour, wraps = self._neighbour(module, towards)
        group = self._grids.pipeline_group(module, towards, wraps=wraps)
        self._outbox.append((dist.isend(buffer, dst=neighbour, group=group), buffer))

    def receive_hidden(self, module: str, shard: Shard, *, origin: int) -> Tensor:
        """[tokens, items, hidden_size] of this rank's shard, from the stage before (-1) or after (+1)."""
        shape = (len(shard.tokens), len(shard.items), self._workload.by_name[module].hidden_size)
        buffer = torch.empty(shape, dtype=self._dtype, device=device())
        neighbour, wraps = self._neighbour(module, origin)
        dist.recv(buffer, src=neighbour, group=self._grids.pipeline_group(module, -origin, wraps=wraps))
        return buffer

    def _neighbour(self, module: str, step: int) -> tuple[int, bool]:
        """The same place on the next stage (+1) or the one before (-1), and whether that is around the ring."""
        placed, at = self._plan.modules[module], self._at[module]
        around, stage = divmod(at.pp + step, placed.layout.pp)
        return rank_at(placed, tp=at.tp, cp=at.cp, dp=at.dp, pp=stage), around != 0


def _place(tokens: object, items: object) -> Place:
    return torch.as_tensor(tokens, device=device()), torch.as_tensor(items, device=device())
