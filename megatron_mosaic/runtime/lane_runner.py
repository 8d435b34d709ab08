"""The actions of one module in one step: what a forward and a backward do with tensors and messages.

F   receive rows or hidden states, run the stage through the script's forward_step, send what it exports
B   receive gradients, autograd, send what its inputs got

With `recompute: whole` the forward keeps no graph, only its inputs and its RNG streams, and B runs it again first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_mosaic.colocation.executor import Times
from megatron_mosaic.colocation.lane import Clock
from megatron_mosaic.definition import Batch, ModelDefinition, StageInputs, StageOutput
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import Place
from megatron_mosaic.parallel_state_ext.boundaries.exchange import Exchange
from megatron_mosaic.parallel_state_ext.boundaries.items import Shard
from megatron_mosaic.parallel_state_ext.boundaries.step_map import StepMap
from megatron_mosaic.parallel_state_ext.rank_view import ModuleView
from megatron_mosaic.parallel_state_ext.rebound.cpu import to_device
from megatron_mosaic.parallel_state_ext.scope import Streams
from megatron_mosaic.plan import Recompute
from megatron_mosaic.runtime.loss_sums import LossSums
from megatron_mosaic.runtime.model import StageCall
from megatron_mosaic.runtime.report import Observers
from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.communication.transfers import Transfer

LossFunction = Callable[[StageOutput], tuple[Tensor, float | Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneTools:
    """What a call of the step runner gives to every lane.

    `run_stage`   the script's forward_step on one stage
    `activate`    around the code of a module: its share of the cores, its RNG streams
    `streams`     of a module, as they are; `activate_again` is `activate` with those of before
    `scale_loss`  of what backward starts from
    `finished`    is told of a module whose last backward has run
    """

    definition: ModelDefinition
    sums: LossSums
    observers: Observers
    run_stage: Callable[[StageCall], tuple[StageOutput, LossFunction]]
    activate: Callable[[str], contextlib.AbstractContextManager[None]]
    streams: Callable[[str], Streams]
    activate_again: Callable[[str, Streams], contextlib.AbstractContextManager[None]]
    scale_loss: Callable[[Tensor], Tensor]
    finished: Callable[[str], None]

    def for_evaluation(self) -> LaneTools:
        """The same where nobody looks on and no gradients are made."""
        return replace(self, observers=Observers(), scale_loss=unscaled, finished=lambda module: None)


def unscaled(loss: Tensor) -> Tensor:
    """The loss itself."""
    return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """A forward whose backward has not run yet."""

    inputs: StageInputs
    output: StageOutput
    loss: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """A forward that left no graph: what its backward needs to run it once more."""

    action: Action
    inputs: StageInputs
    streams: Streams


class LaneRunner:
    """Runs the actions of one module on this rank in one step. Where none is a backward, nothing is kept for one.

    `losses`: forward -> what it adds to the step's loss sums. `_actions_left` counts down to the last one.
    """

    def __init__(
        self,
        module: ModuleView,
        actions: Iterable[Action],
        tools: LaneTools,
        step_map: StepMap,
        exchange: Exchange,
        batch_of: Callable[[range], Batch],
    ) -> None:
        """`batch_of`: the samples of some microbatches as one batch."""
        kinds = [action.kind for action in actions]
        self._module, self._tools, self._batch_of = module, tools, batch_of
        self._map, self._exchange, self._workload = step_map, exchange, tools.definition.workload
        self._trains = any(kind is not Kind.F for kind in kinds)
        self._runs_again = self._trains and module.placed.recompute is Recompute.whole
        self._actions_left = len(kinds)
        self._live: dict[tuple[int, int], _Live | _Again] = {}  # by unit and chunk
        self.losses: dict[Action, Tensor] = {}

    @property
    def num_live(self) -> int:
        """Forwards whose backward has not run."""
        return len(self._live)

    def perform(self, action: Action, clock: Clock) -> Times:
        """Run one action."""
        times = self._WORK[action.kind](self, action, clock)
        self._actions_left -= 1
        if self._trains and not self._actions_left:
            self._tools.finished(self._module.name)
        return times

    def expect(self, transfer: Transfer) -> None:
        """Receive from now on what another lane's action makes for one of this module."""
        (source, target), name = transfer, self._module.name
        shard, is_forward = self._map.shard(name, target.unit), target.kind is Kind.F
        if not shard.items:
            return
        if source.module != name:
            ends = self._module.imports if is_forward else self._module.exports
            (end,) = [end for end in ends if end.opposite.module == source.module]
            self._exchange.expect_rows(end, target.unit, source.unit)
        elif is_forward or self._workload.hidden_has_gradient(name):
            origin = -1 if is_forward else +1
            self._exchange.expect_hidden(name, target.unit, target.chunk, shard, origin=origin)

    def _forward(self, action: Action, clock: Clock) -> Times:
        name, unit, tools = self._module.name, action.unit, self._tools
        shard = self._map.shard(name, unit)
        self._note_unit(action, shard)
        if not shard.items:  # nothing of this unit is ours; every tp, cp and pp peer of the slot sees the same
            return clock(), clock()
        inputs = self._receive_inputs(action, shard)
        start_s = clock()
        if self._runs_again:
            self._live[unit, action.chunk] = _Again(action=action, inputs=inputs, streams=tools.streams(name))
        with tools.activate(name), torch.set_grad_enabled(self._trains and not self._runs_again):
            live = self._compute(action, inputs)
        end_s = clock()
        if self._trains and not self._runs_again:
            self._live[unit, action.chunk] = live
        if live.output.hidden is not None:
            self._exchange.send_hidden(name, unit, action.chunk, live.output.hidden, towards=+1)
        else:
            self._exchange.send_exports(name, unit, live.output.exports)
        return start_s, end_s

    def _compute(self, action: Action, inputs: StageInputs) -> _Live:
        """The stage's forward, and what it adds to the loss."""
        name, tools = self._module.name, self._tools
        kept: list[Tensor] = []  # tensors that no other lane or batch holds
        if self._runs_again:
            kept = [*inputs.imports.values(), *([] if inputs.hidden is None else [inputs.hidden])]
        unit = action.unit, action.chunk
        watched = tools.observers.forward(name, unit, kept) if self._trains else contextlib.nullcontext()
        with watched:
            output, loss_function = tools.run_stage(StageCall(name, action.chunk, inputs))
            loss = self._account_loss(action, output, loss_function)
        return _Live(inputs=inputs, output=output, loss=loss)

    def _receive_inputs(self, action: Action, shard: Shard) -> StageInputs:
        """The stage's inputs; those that have gradients are leaves that collect them."""
        name, unit, definition = self._module.name, action.unit, self._tools.definition
        selected = definition.select_inputs(name, self._batch_of(self._map.covered(name, unit)), shard)
        tensors = {key: to_device(value) for key, value in selected.items()}
        hidden: Tensor | None = None
        imports: dict[str, Tensor] = {}
        imports_at: dict[str, Place] = {}
        if self._module.is_first(action.chunk):
            imports, imports_at = self._exchange.receive_imports(name, unit)
            for source, rows in imports.items():
                imports[source] = rows.detach().requires_grad_(self._trains and source in self._workload.has_backward)
        else:
            hidden = self._exchange.receive_hidden(name, unit, action.chunk, origin=-1)
            hidden.requires_grad_(self._trains and self._workload.hidden_has_gradient(name))
        exports_at = self._exchange.export_places(name, unit) if self._module.is_last(action.chunk) else {}
        return StageInputs(
            shard=shard, tensors=tensors, hidden=hidden, imports=imports, imports_at=imports_at, exports_at=exports_at
        )

    def _account_loss(self, action: Action, output: StageOutput, loss_function: LossFunction) -> Tensor | None:
        """Note this rank's loss for the step's sums (tp ranks have the same) and return what backward starts from."""
        if output.loss is None:
            return None
        loss, num_tokens, report = loss_function(output)
        if self._map.stands_in(self._module.name, action.unit):
            return loss * 0.0
        if self._module.at.tp == 0:
            self.losses[action] = self._tools.sums.of(loss, num_tokens, report)
        return self._tools.scale_loss(loss)

    def _backward(self, action: Action, clock: Clock) -> Times:
        name, unit = self._module.name, action.unit
        shard = self._map.shard(name, unit)
        if not shard.items:
            return clock(), clock()
        gradients = self._receive_gradients(action)
        start_s = clock()
        live = self._live.pop((unit, action.chunk))
        if isinstance(live, _Again):
            with self._tools.activate_again(name, live.streams):
                live = self._compute(live.action, live.inputs)
        wanted = self._pair(live, gradients)
        if wanted:
            with self._tools.activate(name):  # recomputation runs forward code here
                torch.autograd.backward(*map(list, zip(*wanted, strict=True)))
        end_s = clock()
        self._tools.observers.backward(name, (unit, action.chunk))
        hidden = live.inputs.hidden
        if hidden is None:
            self._exchange.send_import_gradients(name, unit, live.inputs.imports)
        elif hidden.requires_grad:
            gradient = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
            self._exchange.send_hidden(name, unit, action.chunk, gradient, towards=-1)
        return start_s, end_s

    def _receive_gradients(self, action: Action) -> Mapping[str, Tensor]:
        """Of what the forward gave: consumer -> of its rows; the module's own name -> of the hidden states."""
        name = self._module.name
        if self._module.is_last(action.chunk):
            return self._exchange.receive_export_gradients(name, action.unit)
        if self._workload.hidden_has_gradient(name):
            return {name: self._exchange.receive_hidden(name, action.unit, action.chunk, origin=+1)}
        return {}

    def _pair(self, live: _Live, gradients: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """What backward starts from, and the gradients of it; None: it is the loss."""
        hidden, exports = live.output.hidden, live.output.exports
        given = exports if hidden is None else {self._module.name: hidden}
        found: list[tuple[Tensor, Tensor | None]] = [
            (given[key], gradient.to(given[key].dtype)) for key, gradient in gradients.items()
        ]
        if live.loss is not None:
            found.append((live.loss, None))
        return [(tensor, gradient) for tensor, gradient in found if tensor.requires_grad]

    def _note_unit(self, action: Action, shard: Shard) -> None:
        units, name = self._tools.observers.units, self._module.name
        if units is not None and not action.chunk:
            is_empty = not shard.items or self._map.stands_in(name, action.unit)
            units.note(name, num_empty=int(is_empty), imbalance=self._map.imbalance(name, action.unit))

    _WORK: ClassVar[Mapping[Kind, Callable[[LaneRunner, Action, Clock], Times]]] = {
        Kind.F: _forward,
        Kind.B: _backward,
    }
