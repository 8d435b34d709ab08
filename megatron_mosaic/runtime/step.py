"""One training (or evaluation) step under a plan: what Megatron's loop calls as `forward_backward_func`.

data_iterator --samples--> metadata of all microbatches --StepMap--> this rank's items, rows, messages
Executor --action--> F: receive rows/hidden, run the stage through the script's forward_step, send what it exports
                     B: receive gradients, autograd, send what its inputs got
then: gradients summed inside each module's groups, divided once by the global number of loss tokens
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_mosaic.colocation.backend_cpu import CpuQuota
from megatron_mosaic.colocation.executor import Clock, Executor
from megatron_mosaic.definition import Batch, ModelDefinition, StageInputs, StageOutput
from megatron_mosaic.parallel_state_ext.boundaries.exchange import Exchange
from megatron_mosaic.parallel_state_ext.boundaries.items import Shard
from megatron_mosaic.parallel_state_ext.boundaries.row_channel import Place
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rebound.cpu import device
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.activation_meter import ActivationMeter
from megatron_mosaic.runtime.model import MosaicModel, StageCall
from megatron_mosaic.schedules.actions import Action, Kind

ForwardStep = Callable[[Iterator[StageCall], MosaicModel], tuple[StageOutput, Callable[[StageOutput], Any]]]
Samples = Sequence[Any]  # of one global microbatch, in order
Collate = Callable[[Samples], Batch]


@dataclass(slots=True)
class _Live:
    """A forward whose backward has not run yet."""

    inputs: StageInputs
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
        self._grids, self._scopes = grids, scopes
        self._workload = definition.workload
        self._exchange = Exchange(plan, self._workload, grids, dtype)
        self._of_plan = PlanMap(plan, self._workload, grids.rank)
        self._cores = CpuQuota({name: plan.modules[name].quota.share for name in self._of_plan.at})
        self.collate: Collate
        self.on_losses: Callable[[dict[str, float]], None] = lambda losses: None
        self.whole_gradients = False  # on every rank, even if a distributed optimizer needs only its shard
        self.meter: ActivationMeter | None = None
        self.empty_units: dict[str, int] = dict.fromkeys(plan.modules, 0)  # units without items, on this rank's lanes
        self._imbalance = {name: [0.0, 0.0, 0.0] for name in plan.modules}  # sums by owner and as it was, units

    @property
    def imbalance(self) -> dict[str, dict[str, float]]:
        """Busiest lane over mean load, over all units so far: as the samples' owners would have it, and as it was."""
        names = ("imbalance_by_owner", "imbalance_by_module")
        return {
            key: {module: sums[i] / sums[2] for module, sums in self._imbalance.items() if sums[2]}
            for i, key in enumerate(names)
        }

    # -- what Megatron calls -------------------------------------------------------------------------------------

    def __call__(
        self,
        *,
        forward_step_func: ForwardStep,
        data_iterator: Iterator[Samples],
        model: MosaicModel | list[MosaicModel],
        num_microbatches: int,
        forward_only: bool = False,
        **_: Any,
    ) -> list[dict[str, Tensor]]:
        """Losses of the step, as Megatron's schedules return them: one dict of [sum, count], complete on rank 0."""
        self._model = model[0] if isinstance(model, list) else model
        self._forward_step, self._forward_only = forward_step_func, forward_only
        self.executor.begin_step(forward_only=forward_only)
        self.executor.record("~data", lambda: self._load(data_iterator, num_microbatches))
        self._live: dict[Action, _Live] = {}
        # loss tokens, the weighted sum that is trained, then (sum, count) of every named loss
        self._totals = torch.zeros(2 + 2 * len(self.definition.loss_names), dtype=torch.float64, device=device())
        program = self.executor.program(num_microbatches, forward_only=forward_only)
        self._backwards_left: dict[str, int] = defaultdict(int)
        for action in program:
            self._backwards_left[action.module] += action.kind is not Kind.F
        # Without no_sync, DistributedDataParallel would reduce buckets of its own accord when a lane's last unit is
        # not its last backward, or never, when that unit is empty.
        with torch.set_grad_enabled(not forward_only), self._model.no_sync():
            self.executor.run(program, self._perform)
        assert not self._live or forward_only, f"forwards without a backward: {list(self._live)}"
        self._exchange.finish_step()
        totals = dist.all_reduce(self._totals, group=self._grids.world, async_op=True)
        if not forward_only:
            self.executor.record("~grads", self._sum_gradients)
        totals.wait()
        if not forward_only:
            self._model.scale_gradients(1.0 / (float(self._totals[0]) or 1.0))
        return [self._report()]

    def _load(self, data_iterator: Iterator[Samples], num_microbatches: int) -> None:
        """Read the step's samples and find out who does what."""
        self._samples = [next(data_iterator) for _ in range(num_microbatches)]
        self._batches = {(m, m + 1): self.collate(samples) for m, samples in enumerate(self._samples)}
        metadata = []
        for batch in self._batches.values():
            links = {(e.source, e.target): self.definition.list_links(e, batch) for e in self._workload.edges}
            metadata.append(Metadata(items=self.definition.list_items(batch), links=links))
        self._map = StepMap(self._of_plan, metadata)
        self._exchange.begin_step(self._map)

    def _batch(self, covered: range) -> Batch:
        """The samples of these microbatches as one batch."""
        key = (covered.start, covered.stop)
        if key not in self._batches:
            self._batches[key] = self.collate([sample for m in covered for sample in self._samples[m]])
        return self._batches[key]

    # -- actions -------------------------------------------------------------------------------------------------

    def _perform(self, action: Action, clock: Clock) -> tuple[float, float]:
        """Run one action; returns when its own work began (inputs at hand) and ended."""
        shard = self._map.shard(action.module, action.unit)
        if action.kind is Kind.F:
            self._note_unit(action, shard)
        if shard.items:
            run = self._run_forward if action.kind is Kind.F else self._run_backward
            times = run(action, shard, clock)
        else:  # nothing of this unit is ours; every tp, cp and pp peer of the lane sees the same
            times = (clock(), clock())
        if action.kind is not Kind.F:
            self._backwards_left[action.module] -= 1
            if self._overlaps and not self._backwards_left[action.module]:
                self._model.start_sync([action.module], whole=self.whole_gradients)
        return times

    def _run_forward(self, action: Action, shard: Shard, clock: Clock) -> tuple[float, float]:
        module, trains = action.module, action.module in self._workload.has_backward and not self._forward_only
        inputs = self._receive_inputs(action, shard, trains=trains)
        start_s = clock()
        self._cores.grant(module)
        with self._scopes.enter(module), self._metered(action, trains=trains), torch.set_grad_enabled(trains):
            output, loss_func = self._forward_step(iter([StageCall(module, action.chunk, inputs)]), self._model)
            loss = self._account_loss(action, output, loss_func)
        end_s = clock()
        if trains:
            self._live[action._replace(kind=Kind.B)] = _Live(inputs, output, loss)
        if output.hidden is not None:
            self._exchange.send_hidden(module, output.hidden, towards=+1)
        else:
            self._exchange.send_exports(module, action.unit, output.exports)
        return start_s, end_s

    def _receive_inputs(self, action: Action, shard: Shard, *, trains: bool) -> StageInputs:
        """The stage's inputs; those that have gradients are leaves that collect them."""
        module, unit = action.module, action.unit
        batch = self._batch(self._map.covered(module, unit))
        selected = self.definition.select_inputs(module, batch, shard)
        tensors = {key: value.to(device()) for key, value in selected.items()}
        hidden: Tensor | None = None
        imports: dict[str, Tensor] = {}
        imports_at: dict[str, Place] = {}
        if action.stage or action.chunk:
            hidden = self._exchange.receive_hidden(module, shard, origin=-1)
            hidden.requires_grad_(trains and self._workload.hidden_has_gradient(module))
        else:
            imports, imports_at = self._exchange.receive_imports(module, unit)
            for source, rows in imports.items():
                imports[source] = rows.detach().requires_grad_(trains and source in self._workload.has_backward)
        exports_at = self._exchange.export_places(module, unit) if self._is_last(action) else {}
        return StageInputs(
            shard=shard, tensors=tensors, hidden=hidden, imports=imports, imports_at=imports_at, exports_at=exports_at
        )

    def _run_backward(self, action: Action, shard: Shard, clock: Clock) -> tuple[float, float]:
        module, live = action.module, self._live.pop(action)
        tensors: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if live.output.hidden is not None:
            if self._workload.hidden_has_gradient(module):
                tensors.append(live.output.hidden)
                gradients.append(self._exchange.receive_hidden(module, shard, origin=+1))
        else:
            for target, rows in self._exchange.receive_export_gradients(module, action.unit).items():
                tensors.append(live.output.exports[target])
                gradients.append(rows.to(tensors[-1].dtype))
        if live.loss is not None:
            tensors.append(live.loss)
            gradients.append(None)
        wanted = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t.requires_grad]
        start_s = clock()
        self._cores.grant(module)
        if wanted:
            with self._scopes.enter(module):  # recomputation runs forward code here
                torch.autograd.backward(*map(list, zip(*wanted, strict=True)))
        end_s = clock()
        if self.meter is not None:
            self.meter.backward(module, (action.unit, action.chunk))
        hidden = live.inputs.hidden
        if hidden is None:
            self._exchange.send_import_gradients(module, action.unit, live.inputs.imports)
        elif hidden.requires_grad:
            gradient = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
            self._exchange.send_hidden(module, gradient, towards=-1)
        return start_s, end_s

    def _is_last(self, action: Action) -> bool:
        layout = self.plan.modules[action.module].layout
        return (action.stage, action.chunk) == (layout.pp - 1, layout.vpp - 1)

    def _metered(self, action: Action, *, trains: bool) -> contextlib.AbstractContextManager[None]:
        if self.meter is None or not trains:
            return contextlib.nullcontext()
        return self.meter.forward(action.module, (action.unit, action.chunk))

    def _account_loss(
        self, action: Action, output: StageOutput, loss_func: Callable[[StageOutput], Any]
    ) -> Tensor | None:
        """Add this rank's loss to the step's totals (tp ranks have the same) and return what backward starts from."""
        if output.loss is None:
            return None
        loss, num_tokens, report = loss_func(output)
        if self._map.is_ghost(action.module, action.unit):
            return loss * 0.0
        if self._of_plan.at[action.module].tp == 0:
            self._totals[0] += float(num_tokens)
            self._totals[1] += loss.detach().double()
            for index, name in enumerate(self.definition.loss_names):
                if name in report:
                    self._totals[2 + 2 * index : 4 + 2 * index] += report[name].detach().double()
        scale = self._model.config.grad_scale_func
        return scale(loss) if scale is not None and not self._forward_only else loss

    def _note_unit(self, action: Action, shard: Shard) -> None:
        if self._forward_only or action.chunk:
            return
        self.empty_units[action.module] += not shard.items or self._map.is_ghost(action.module, action.unit)
        sums, found = self._imbalance[action.module], (*self._map.imbalance(action.module, action.unit), 1)
        self._imbalance[action.module] = [old + new for old, new in zip(sums, found, strict=True)]

    # -- the end of a step ---------------------------------------------------------------------------------------

    @property
    def _overlaps(self) -> bool:
        """Whether a module's gradients are summed while other modules still compute."""
        return not self._forward_only and self._model.ddp_config.overlap_grad_reduce

    def _sum_gradients(self) -> None:
        """Sum gradients inside every module: all modules at once, unless each has begun after its last backward."""
        if not self._overlaps:
            self._model.start_sync(self._grids.collections, whole=self.whole_gradients)
        for name, groups in self._grids.collections.items():
            with self._scopes.enter(name):
                finalize_model_grads(
                    self._model.stages_of(name), None, pg_collection=groups, force_all_reduce=self.whole_gradients
                )

    def _report(self) -> dict[str, Tensor]:
        """The global sums on rank 0 and zeros elsewhere: the loop adds them up over the world."""
        losses = {}
        values = {"loss": float(self._totals[1]) / (float(self._totals[0]) or 1.0)}
        for index, name in enumerate(self.definition.loss_names):
            total, count = self._totals[2 + 2 * index : 4 + 2 * index].tolist()
            values[name] = total / count if count else 0.0
            mine = (total, max(count, 1.0)) if self._grids.rank == 0 else (0.0, 0.0)
            losses[name] = torch.tensor(mine, dtype=torch.float32, device=device())
        if not self._forward_only:
            self.on_losses(values)
        return losses
