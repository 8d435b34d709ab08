"""One training (or evaluation) step under a plan: what Megatron's loop calls as `forward_backward_func`.

data_iterator --global microbatches--> assign_items --> this rank's lanes
Executor --action--> F: receive rows/hidden, run the stage through the script's forward_step, send what it exports
                     B: receive gradients, autograd, send what its inputs got
then: gradients summed inside each module's groups, divided once by the global number of loss tokens
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_mosaic.batch import Assignment, assign_items
from megatron_mosaic.colocation.activation_meter import ActivationMeter
from megatron_mosaic.colocation.backend_cpu import CpuQuota
from megatron_mosaic.colocation.executor import Clock, Executor
from megatron_mosaic.definition import Batch, ModelDefinition, StageOutput
from megatron_mosaic.model import MosaicModel, StageCall
from megatron_mosaic.parallel_state_ext.boundary import RowChannel
from megatron_mosaic.parallel_state_ext.cpu import device
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.ranks import Coordinates, coordinates_of, rank_at
from megatron_mosaic.parallel_state_ext.routes import Transfer, build_route
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedule import Action, Kind
from megatron_mosaic.workload import Edge

ForwardStep = Callable[[Iterator[StageCall], MosaicModel], tuple[StageOutput, Callable[[StageOutput], Any]]]


@dataclass(slots=True)
class _Microbatch:
    """One global microbatch and who works on what of it."""

    batch: Batch
    assignment: Assignment
    routes: dict[tuple[str, str, bool], tuple[Transfer, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Live:
    """A forward whose backward has not run yet."""

    hidden: Tensor | None
    imports: dict[str, Tensor]
    output: StageOutput
    loss: Tensor | None


class StepRunner:
    """Runs steps on one rank. Collective: every rank of the plan calls it, idle ranks included."""

    def __init__(
        self,
        plan: Plan,
        definition: ModelDefinition,
        grids: Grids,
        scopes: Scopes,
        executor: Executor,
        dtype: torch.dtype,
    ) -> None:
        self.plan, self.definition, self.executor = plan, definition, executor
        self._grids, self._scopes, self._dtype = grids, scopes, dtype
        workload = definition.workload
        self._backbone = workload.backbone.name
        self._modules = workload.by_name
        self._coordinates: dict[str, Coordinates] = {
            name: coordinates_of(plan.modules[name], grids.rank) for name in plan.modules_on(grids.rank)
        }
        self._edges = workload.edges
        self._forward = {(e.source, e.target): self._channel(e, e.source, e.target) for e in workload.edges}
        self._backward = {(e.source, e.target): self._channel(e, e.target, e.source) for e in workload.edges}
        self._outbox: list[tuple[dist.Work, Tensor]] = []
        self.on_losses: Callable[[dict[str, float]], None] = lambda losses: None
        self._cores = CpuQuota({name: plan.modules[name].quota.share for name in self._coordinates})
        self.whole_gradients = False  # on every rank, even if a distributed optimizer needs only its shard
        self.meter: ActivationMeter | None = None
        self.empty_units: dict[str, int] = dict.fromkeys(plan.modules, 0)  # units without items, on this rank's lanes

    # -- what Megatron calls -------------------------------------------------------------------------------------

    def __call__(
        self,
        *,
        forward_step_func: ForwardStep,
        data_iterator: Iterator[Batch],
        model: MosaicModel | list[MosaicModel],
        num_microbatches: int,
        forward_only: bool = False,
        **_: Any,
    ) -> list[dict[str, Tensor]]:
        """Losses of the step, as Megatron's schedules return them: one dict of [sum, count], complete on rank 0."""
        self._model = model[0] if isinstance(model, list) else model
        self._forward_step, self._forward_only = forward_step_func, forward_only
        self.executor.begin_step(forward_only=forward_only)
        self._microbatches = self.executor.record(
            "~data", lambda: [self._next_microbatch(data_iterator) for _ in range(num_microbatches)]
        )
        self._live: dict[tuple[str, int], _Live] = {}
        # loss tokens, the weighted sum that is trained, then (sum, count) of every named loss
        self._totals = torch.zeros(2 + 2 * len(self.definition.loss_names), dtype=torch.float64, device=device())
        with torch.set_grad_enabled(not forward_only):
            self.executor.run(num_microbatches, self._perform, forward_only=forward_only)
        assert not self._live or forward_only, f"forwards without a backward: {list(self._live)}"
        self._finish_messages()
        if not forward_only:
            self.executor.record("~grads", self._sum_gradients)
        dist.all_reduce(self._totals, group=self._grids.world)
        if not forward_only:
            self._model.scale_gradients(1.0 / max(1.0, float(self._totals[0])))
        return [self._report()]

    # -- actions -------------------------------------------------------------------------------------------------

    def _perform(self, action: Action, clock: Clock) -> tuple[float, float]:
        """Run one action; returns when its own work began (inputs at hand) and ended."""
        microbatch = self._microbatches[action.unit]
        items = microbatch.assignment.lanes[action.module][self._coordinates[action.module].dp]
        if not items:  # nothing of this microbatch is ours; every tp and pp peer of the lane sees the same
            self.empty_units[action.module] += action.kind is Kind.F and not self._forward_only
            now = clock()
            return now, now
        run = self._run_forward if action.kind is Kind.F else self._run_backward
        return run(action, microbatch, items, clock)

    def _run_forward(
        self, action: Action, microbatch: _Microbatch, items: Sequence[int], clock: Clock
    ) -> tuple[float, float]:
        module = action.module
        hidden, imports = self._receive_inputs(action, microbatch, items)
        inputs = {
            key: value.to(device())
            for key, value in self.definition.select_inputs(module, microbatch.batch, items).items()
        }
        call = StageCall(module, inputs, hidden, imports)
        start_s = clock()
        self._cores.grant(module)
        with self._scopes.enter(module), self._metered(module, action.unit):
            output, loss_func = self._forward_step(iter([call]), self._model)
            loss = self._account_loss(module, output, loss_func)
        end_s = clock()
        if not self._forward_only:
            self._live[module, action.unit] = _Live(hidden, imports, output, loss)
        if output.hidden is not None:
            self._send_hidden(module, output.hidden, towards=+1)
        for edge in self._edges:
            if edge.source == module and self._is_last_stage(module):
                route = self._route(edge, microbatch, backward=False)
                if any(transfer.sender == self._grids.rank for transfer in route):
                    channel = self._forward[edge.source, edge.target]
                    channel.send(action.unit, route, output.exports[edge.target].to(self._dtype))
        return start_s, end_s

    def _run_backward(
        self, action: Action, microbatch: _Microbatch, items: Sequence[int], clock: Clock
    ) -> tuple[float, float]:
        module = action.module
        live = self._live.pop((module, action.unit))
        tensors: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if live.output.hidden is not None:
            tensors.append(live.output.hidden)
            gradients.append(self._receive_hidden(module, len(items), origin=+1))
        for edge in self._edges:
            if edge.source == module and self._is_last_stage(module):
                held = self._held(edge, microbatch, module)
                if held:
                    route = self._route(edge, microbatch, backward=True)
                    rows = self._backward[edge.source, edge.target].receive(action.unit, route, len(held))
                    exported = live.output.exports[edge.target]
                    tensors.append(exported)
                    gradients.append(rows.to(exported.dtype))
        if live.loss is not None:
            tensors.append(live.loss)
            gradients.append(None)
        start_s = clock()
        self._cores.grant(module)
        with self._scopes.enter(module):  # recomputation runs forward code here
            torch.autograd.backward(tensors, gradients)
        end_s = clock()
        if self.meter is not None:
            self.meter.backward(module, action.unit)
        if live.hidden is not None:
            assert live.hidden.grad is not None
            self._send_hidden(module, live.hidden.grad, towards=-1)
        for edge in self._edges:
            if edge.target == module and edge.source in live.imports:
                rows = live.imports[edge.source]
                gradient = rows.grad if rows.grad is not None else torch.zeros_like(rows)
                route = self._route(edge, microbatch, backward=True)
                self._backward[edge.source, edge.target].send(action.unit, route, gradient)
        return start_s, end_s

    def _metered(self, module: str, unit: int) -> contextlib.AbstractContextManager[None]:
        if self.meter is None or self._forward_only:
            return contextlib.nullcontext()
        return self.meter.forward(module, unit)

    def _receive_inputs(
        self, action: Action, microbatch: _Microbatch, items: Sequence[int]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The stage's inputs as leaves that collect gradients."""
        module = action.module
        if action.stage > 0:
            return self._receive_hidden(module, len(items), origin=-1).requires_grad_(not self._forward_only), {}
        imports = {}
        for edge in self._edges:
            held = self._held(edge, microbatch, module) if edge.target == module else ()
            if held:
                route = self._route(edge, microbatch, backward=False)
                rows = self._forward[edge.source, edge.target].receive(action.unit, route, len(held))
                imports[edge.source] = rows.detach().requires_grad_(not self._forward_only)
        return None, imports

    def _account_loss(self, module: str, output: StageOutput, loss_func: Callable[[StageOutput], Any]) -> Tensor | None:
        """Add this lane's loss to the step's totals (once per lane) and return what backward starts from."""
        if output.loss is None:
            return None
        loss, num_tokens, report = loss_func(output)
        if self._coordinates[module].tp == 0:
            self._totals[0] += float(num_tokens)
            self._totals[1] += loss.detach().double()
            for index, name in enumerate(self.definition.loss_names):
                if name in report:
                    self._totals[2 + 2 * index : 4 + 2 * index] += report[name].detach().double()
        scale = self._model.config.grad_scale_func
        return scale(loss) if scale is not None and not self._forward_only else loss

    # -- the end of a step ---------------------------------------------------------------------------------------

    def _sum_gradients(self) -> None:
        """Sum gradients inside every module."""
        for name, stage in self._model.stages.items():
            with self._scopes.enter(name):
                finalize_model_grads(
                    [stage],
                    None,
                    pg_collection=self._grids.collections[name],
                    force_all_reduce=self.whole_gradients,
                )

    def _finish_messages(self) -> None:
        for channel in (*self._forward.values(), *self._backward.values()):
            channel.drain()
        for work, _ in self._outbox:
            work.wait()
        self._outbox.clear()

    def _report(self) -> dict[str, Tensor]:
        """The global sums on rank 0 and zeros elsewhere: the loop adds them up over the world."""
        losses = {}
        values = {"loss": float(self._totals[1]) / max(1.0, float(self._totals[0]))}
        for index, name in enumerate(self.definition.loss_names):
            total, count = self._totals[2 + 2 * index : 4 + 2 * index].tolist()
            count = max(count, 1.0)
            values[name] = total / count
            mine = (total, count) if self._grids.rank == 0 else (0.0, 0.0)
            losses[name] = torch.tensor(mine, dtype=torch.float32, device=device())
        if not self._forward_only:
            self.on_losses(values)
        return losses

    # -- who holds what ------------------------------------------------------------------------------------------

    def _next_microbatch(self, data_iterator: Iterator[Batch]) -> _Microbatch:
        batch = next(data_iterator)
        return _Microbatch(batch, assign_items(self.plan, self._backbone, self.definition.count_items(batch)))

    def _is_last_stage(self, module: str) -> bool:
        return self._coordinates[module].pp == self.plan.modules[module].layout.pp - 1

    def _held(self, edge: Edge, microbatch: _Microbatch, module: str) -> tuple[int, ...]:
        """The edge's items that this rank's lane of `module` holds."""
        items_of = self.definition.workload.items_of(edge)
        held = microbatch.assignment.held_by(module, items_of, self._backbone)
        return held[self._coordinates[module].dp]

    def _route(self, edge: Edge, microbatch: _Microbatch, *, backward: bool) -> tuple[Transfer, ...]:
        items_of = self.definition.workload.items_of(edge)
        key = (edge.source, edge.target, backward)
        if key not in microbatch.routes:
            source = microbatch.assignment.held_by(edge.source, items_of, self._backbone)
            target = microbatch.assignment.held_by(edge.target, items_of, self._backbone)
            source_lanes = list(zip(self._lane_ranks(edge.source, last=True), source, strict=True))
            target_lanes = list(zip(self._lane_ranks(edge.target, last=False), target, strict=True))
            sides = (target_lanes, source_lanes) if backward else (source_lanes, target_lanes)
            microbatch.routes[key] = build_route(*sides)
        return microbatch.routes[key]

    def _lane_ranks(self, module: str, *, last: bool) -> list[tuple[int, ...]]:
        """Per lane of the module: the tp replicas of its last (or first) stage."""
        plan = self.plan.modules[module]
        pp = plan.layout.pp - 1 if last else 0
        return [
            tuple(rank_at(plan, tp=tp, dp=dp, pp=pp) for tp in range(plan.layout.tp)) for dp in range(plan.layout.dp)
        ]

    # -- messages ------------------------------------------------------------------------------------------------

    def _channel(self, edge: Edge, sender: str, receiver: str) -> RowChannel:
        return RowChannel(
            self._grids.boundary_group(sender, receiver),
            rows_per_item=edge.rows_per_item,
            width=edge.width,
            dtype=self._dtype,
            device=device(),
        )

    def _peer(self, module: str, step: int) -> int:
        place = self._coordinates[module]
        return rank_at(self.plan.modules[module], tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp + step)

    def _send_hidden(self, module: str, hidden: Tensor, *, towards: int) -> None:
        buffer = hidden.detach().contiguous()
        self._outbox = [(work, kept) for work, kept in self._outbox if not work.is_completed()]
        work = dist.isend(buffer, dst=self._peer(module, towards), group=self._grids.pipeline_group(module, towards))
        self._outbox.append((work, buffer))

    def _receive_hidden(self, module: str, num_items: int, *, origin: int) -> Tensor:
        """[tokens_per_item, items, hidden_size] from the neighbouring stage."""
        sizes = self._modules[module]
        shape = (sizes.tokens_per_item, num_items, sizes.hidden_size)
        buffer = torch.empty(shape, dtype=self._dtype, device=device())
        dist.recv(buffer, src=self._peer(module, origin), group=self._grids.pipeline_group(module, -origin))
        return buffer
