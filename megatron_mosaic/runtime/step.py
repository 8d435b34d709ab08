"""One training (or evaluation) step under a plan: what Megatron's loop calls as `forward_backward_func`.

data_iterator --samples--> Step: metadata of all microbatches --StepMap--> this rank's items, rows, messages
Executor --action--> Step.perform --> LaneRunner of the action's module
then: gradients summed inside each module's groups, divided once by the global number of loss tokens
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_mosaic.colocation.backend_cpu import CpuQuota
from megatron_mosaic.colocation.executor import Executor, Times
from megatron_mosaic.colocation.lane import Clock
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.definition import Batch, ModelDefinition, StageOutput
from megatron_mosaic.parallel_state_ext.boundaries.exchange import Channels, Exchange
from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import Fingerprint, no_fingerprint
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound.lane_random import no_shared_draws
from megatron_mosaic.parallel_state_ext.scope import Scopes, Streams
from megatron_mosaic.runtime.lane_runner import LaneRunner, LaneTools, LossFunction, unscaled
from megatron_mosaic.runtime.loss_sums import LossSums
from megatron_mosaic.runtime.model import MosaicModel, StageCall
from megatron_mosaic.runtime.report import Observers
from megatron_mosaic.schedules.actions import Action

ForwardStep = Callable[[Iterator[StageCall], MosaicModel], tuple[StageOutput, LossFunction]]
Samples = Sequence[Any]  # of one global microbatch, in order
Collate = Callable[[Samples], Batch]


class Batches:
    """The samples of a step's microbatches as batches. Lanes that run at the same time ask one after the other."""

    def __init__(self, samples: Sequence[Samples], collate: Collate) -> None:
        self._samples, self._collate = samples, collate
        self.of_microbatch = [collate(one) for one in samples]
        self._joined: dict[range, Batch] = {range(m, m + 1): batch for m, batch in enumerate(self.of_microbatch)}
        self._lock = threading.Lock()

    def covering(self, microbatches: range) -> Batch:
        """The samples of these microbatches as one batch."""
        with self._lock:
            if microbatches not in self._joined:
                samples = [sample for m in microbatches for sample in self._samples[m]]
                self._joined[microbatches] = self._collate(samples)
            return self._joined[microbatches]


class Step:
    """One step of one rank: its batches, who holds what of them, and a LaneRunner for each of its modules."""

    def __init__(
        self,
        program: RankProgram,
        samples: Sequence[Samples],
        collate: Collate,
        of_plan: PlanMap,
        channels: Channels,
        tools: LaneTools,
        fingerprint: Fingerprint = no_fingerprint,
    ) -> None:
        """`program`: this rank's part of the schedule. `samples`: of each microbatch, the same on every rank."""
        self.program, self._sums = program, tools.sums
        batches = Batches(samples, collate)
        metadata = [_read_metadata(tools.definition, batch, fingerprint) for batch in batches.of_microbatch]
        step_map = StepMap(of_plan, metadata)
        self._exchange = Exchange(channels, step_map)
        self._lanes = {
            name: LaneRunner(
                module,
                [action for action in program.actions if action.module == name],
                tools,
                step_map,
                self._exchange,
                batches.covering,
            )
            for name, module in of_plan.view.modules.items()
        }

        self._expect_after(None)

    def perform(self, action: Action, clock: Clock) -> Times:
        """Run one action; returns when its own work began (inputs at hand) and ended."""
        times = self._lanes[action.module].perform(action, clock)
        self._expect_after(action)
        return times

    def _expect_after(self, action: Action | None) -> None:
        """Receive from now on what the schedule says may come after this action (None: from the start)."""
        for transfer in self.program.receives.get(action, ()):
            self._lanes[transfer.target.module].expect(transfer)

    def finish(self) -> Tensor:
        """This rank's loss sums, once all its messages have left."""
        live = {name: lane.num_live for name, lane in self._lanes.items() if lane.num_live}
        assert not live, f"forwards without a backward: {live}"
        self._exchange.finish()
        totals = self._sums.zeros()
        for action in self.program.actions:  # in one order, whichever lane was first: the sum is the same to the bit
            losses = self._lanes[action.module].losses
            if action in losses:
                totals += losses[action]
        return totals


class StepRunner:
    """Runs steps on one rank. Collective: every rank of the plan calls it, idle ranks included."""

    def __init__(
        self,
        view: RankView,
        definition: ModelDefinition,
        collate: Collate,
        grids: Grids,
        scopes: Scopes,
        executor: Executor,
        dtype: torch.dtype,
        observers: Observers,
        cores: CpuQuota,
        fingerprint: Fingerprint = no_fingerprint,
    ) -> None:
        """`cores`: of the modules, where they compute on a CPU. `fingerprint`: of the samples of every message."""
        self._view, self._definition, self._collate, self._fingerprint = view, definition, collate, fingerprint
        self._grids, self._scopes, self._executor, self._observers = grids, scopes, executor, observers
        self._sums = LossSums(names=definition.loss_names)
        self._channels = Channels(view, definition.workload, grids, dtype)
        self._of_plan = PlanMap(view, definition.workload)
        self._cores = cores

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
        own = model[0] if isinstance(model, list) else model
        tools = self._tools(forward_step_func, own)
        if forward_only:
            tools = tools.for_evaluation()
        self._executor.begin_step(forward_only=forward_only)
        program = self._executor.program(num_microbatches, forward_only=forward_only)
        step = self._executor.record("~data", lambda: self._begin(program, data_iterator, num_microbatches, tools))
        is_shared = self._executor.lanes.in_threads and len(program.tracks) > 1
        shared = no_shared_draws() if is_shared else contextlib.nullcontext()
        # Without no_sync, DistributedDataParallel would reduce buckets of its own accord when a dp slot's last unit is
        # not its last backward, or never, when that unit is empty.
        with torch.set_grad_enabled(not forward_only), own.no_sync(), shared:
            self._executor.run(program, step.perform)
        totals = step.finish()
        summed = dist.all_reduce(totals, group=self._grids.world, async_op=True)
        if not forward_only:
            self._executor.record("~grads", lambda: self._sum_gradients(own))
        summed.wait()
        if not forward_only:
            own.scale_gradients(1.0 / self._sums.divisor(totals))
            self._observers.losses(self._executor.step, self._sums.means(totals))
        rows = self._sums.as_reported(totals)  # the loop adds them up over the world
        return [rows if self._view.rank == 0 else {name: torch.zeros_like(row) for name, row in rows.items()}]

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Module -> bytes of rows, and of gradients of rows, that have left it for other ranks since the start."""
        return self._channels.sent_bytes

    def _tools(self, forward_step: ForwardStep, model: MosaicModel) -> LaneTools:
        """What a training step's lanes work with."""
        scale = model.config.grad_scale_func
        overlaps = model.ddp_config.overlap_grad_reduce
        return LaneTools(
            definition=self._definition,
            sums=self._sums,
            observers=self._observers,
            run_stage=lambda call: forward_step(iter([call]), model),
            activate=self._activate,
            streams=lambda module: self._scopes.states()[module],
            activate_again=self._activate_again,
            scale_loss=unscaled if scale is None else scale,
            finished=(lambda module: model.start_sync([module])) if overlaps else lambda module: None,
        )

    def _begin(
        self, program: RankProgram, data_iterator: Iterator[Samples], num_microbatches: int, tools: LaneTools
    ) -> Step:
        """Read the step's samples and find out who does what."""
        samples = [next(data_iterator) for _ in range(num_microbatches)]
        return Step(program, samples, self._collate, self._of_plan, self._channels, tools, self._fingerprint)

    @contextlib.contextmanager
    def _activate(self, module: str) -> Iterator[None]:
        """The body is code of this module."""
        self._cores.grant(module)
        with self._scopes.enter(module):
            yield

    @contextlib.contextmanager
    def _activate_again(self, module: str, streams: Streams) -> Iterator[None]:
        """The same with its RNG streams as they were once."""
        self._cores.grant(module)
        with self._scopes.enter_again(module, streams):
            yield

    def _sum_gradients(self, model: MosaicModel) -> None:
        """Sum gradients inside every module: all modules at once, unless each has begun after its last backward."""
        if not model.ddp_config.overlap_grad_reduce:
            model.start_sync(self._grids.collections)
        for name, groups in self._grids.collections.items():
            with self._scopes.enter(name):
                finalize_model_grads(model.stages_of(name), None, pg_collection=groups)


def _read_metadata(definition: ModelDefinition, batch: Batch, fingerprint: Fingerprint) -> Metadata:
    edges = definition.workload.edges
    links = {(edge.source, edge.target): definition.list_links(edge, batch) for edge in edges}
    return Metadata(items=definition.list_items(batch), links=links, content=fingerprint(batch))
