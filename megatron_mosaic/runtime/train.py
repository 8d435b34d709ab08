"""Plan -> Megatron's own `pretrain()`. The only driver.

A script parses its arguments with `arguments.parse_and_validate_args`, describes its model as a ModelDefinition, and

    runtime = Runtime(args, plan, definition, collate)
    provider = runtime.data_provider(make_datasets)
    with runtime.finishing():
        pretrain(runtime.container, provider, model_type, forward_step, **runtime.seams)
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.training import get_args, get_tensorboard_writer
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.models.base import ModelBuilder, ModelConfig
from megatron.training.utils import print_rank_0

from megatron_mosaic.colocation.backend import Opened, open_lanes
from megatron_mosaic.colocation.backend_cpu import CpuQuota
from megatron_mosaic.colocation.executor import Executor
from megatron_mosaic.definition import ModelDefinition
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.flight.process import begin_flight, collective_timeout, end_flight, noted
from megatron_mosaic.flight.results import ResultWatch
from megatron_mosaic.flight.verdict import naming
from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import fingerprint_samples, no_fingerprint
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.lane_state import lane_thread
from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import (
    ModuleOptimizers,
    NotFinite,
    Stepped,
    build_optimizer,
)
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parallel_state_ext.rebound.guard import Guard
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_training
from megatron_mosaic.parallel_state_ext.rng_states import RngStates
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Plan, validate_plan
from megatron_mosaic.runtime.activation_meter import ActivationMeter
from megatron_mosaic.runtime.arguments import lr_mults_from_args
from megatron_mosaic.runtime.checkpoint import Checkpoints
from megatron_mosaic.runtime.dumps.writer import Dump
from megatron_mosaic.runtime.model import MosaicModel, empty_stage, initialize_by_name, stage_key, wrap_stage
from megatron_mosaic.runtime.report import Observers, UnitStatistics
from megatron_mosaic.runtime.step import Collate, Samples, StepRunner
from megatron_mosaic.runtime.telemetry.numbers import lanes_of
from megatron_mosaic.runtime.telemetry.periodic import PeriodicReport
from megatron_mosaic.runtime.telemetry.prediction import load_prediction
from megatron_mosaic.runtime.telemetry.step_report import StepReport
from megatron_mosaic.schedules import Schedule
from megatron_mosaic.schedules.passes import modules_by_track
from megatron_mosaic.schedules.plan_match import load_training_schedule
from megatron_mosaic.schedules.text import format_schedule, parse_schedule
from megatron_mosaic.units import format_seconds

MakeDatasets = Callable[[Sequence[int]], Sequence[Any]]  # numbers of samples -> (train, valid, test), map-style


class Runtime:
    """Everything a plan needs on one rank. Collective: constructed by every rank of the plan.

    Initialises torch.distributed, creates all process groups, and puts our optimizer and executor into Megatron's
    training loop. `_models`: those that the loop has built, one.
    """

    def __init__(self, args: argparse.Namespace, plan: Plan, definition: ModelDefinition, collate: Collate) -> None:
        """`collate` makes a batch of samples."""
        validate_plan(plan, definition.workload)
        self.plan, self.definition, self._args = plan, definition, args
        self._models: list[MosaicModel] = []
        self._flight = begin_flight(args.rank)
        ResultWatch(self._flight)
        timeout = collective_timeout(args.distributed_timeout_minutes)
        with naming(self._flight):
            _initialize_distributed(args, timeout)
            self._flight.note("set-up: process groups")
            self.view = RankView.of(plan, dist.get_rank(), definition.workload.edges)
            training = load_training_schedule(plan, definition.workload, args.mosaic_schedule)
            apart = tuple(plan.modules) if any(training.tracks.values()) else ()
            self.grids = Grids(self.view, timeout=timeout, apart=apart)
        self.scopes = Scopes(args.seed, self.view, apart)
        self.guard = Guard(lambda: self.scopes.active).install() if args.mosaic_guard else None
        opened = _open_lanes(args.mosaic_quota_backend, self.view, training)
        self.executor = Executor(plan, definition.workload, self.view.rank, training, opened.lanes)
        print_rank_0(f"> mosaic: {self.grids.num_groups} process groups in {format_seconds(self.grids.creation_s)}")
        _agree_on_schedule(self.executor, self.grids.world)
        self.observers = _observers_from_args(args, self.view, self.grids.world)
        self.step = StepRunner(
            self.view,
            definition,
            collate,
            self.grids,
            self.scopes,
            self.executor,
            args.params_dtype,
            self.observers,
            CpuQuota(opened.threads),
            fingerprint_samples if args.mosaic_guard else no_fingerprint,
        )
        draw_rng_states = partial(Scopes, view=self.view, apart=apart)
        self.checkpoints = Checkpoints(args, plan, definition.workload, self.grids.world, draw_rng_states)
        self._flight.note("set-up: Megatron")
        rebind_training(get_megatron_optimizer=self._build_optimizer, get_forward_backward_func=self._run_steps)

    @property
    def seams(self) -> dict[str, Any]:
        """The official arguments of `pretrain()`."""
        return {"pg_collection": self.grids.world_view(), "skip_model_parallel_init": True}

    @property
    def container(self) -> Any:
        """Megatron's configuration container, with our model in it."""
        return pretrain_cfg_container_from_args(self._args, MosaicModelConfig(_runtime=self))

    def data_provider(self, make_datasets: MakeDatasets) -> DataProvider:
        """A provider for `pretrain()`. `make_datasets` is the script's own, of (train, valid, test) datasets."""
        slots = self.plan.modules[self.definition.workload.backbone.name].layout.dp
        return DataProvider(make_datasets=make_datasets, samples_per_microbatch=self.plan.micro_batch_size * slots)

    @noted("set-up: model")
    def build_model(self, ddp_config: DistributedDataParallelConfig) -> MosaicModel:
        """This rank's stages, initialised by name and wrapped for data parallelism in their module's groups."""
        stages = {}
        for name, module in self.view.modules.items():
            groups, build = self.grids.collections[name], self.definition.build_stage
            for chunk in module.chunks:
                track = self.executor.training.tracks[f"{name}.{module.at.pp}"]
                with self.scopes.enter(name), self.executor.lanes.building(track):
                    stage: MegatronModule = build(name, module.placed, module.at.pp, groups, chunk)
                    stage.pg_collection, stage.tp_group = groups, groups.tp  # who holds which shard of a checkpoint
                    initialize_by_name(stage, name, self._args.seed)
                    stage.to(device=cpu.device(), dtype=self._args.params_dtype)
                    stages[stage_key(name, chunk)] = wrap_stage(stage, ddp_config, groups)
        if self.observers.meter is not None:
            for wrapped in stages.values():
                self.observers.meter.ignore(wrapped)
        config = core_transformer_config_from_args(self._args)
        rng_states = RngStates(self.scopes, self.view.rank, self.plan.world_size)
        self._models.append(MosaicModel(config, stages, ddp_config, self.grids.world_view(), rng_states))
        return self._models[-1]

    def _run_steps(self, **_: Any) -> StepRunner:
        """What Megatron's loop asks for, once it has loaded."""
        self.executor.count_from(get_args().iteration)
        return self.step

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Around `pretrain()`: finish after it, also when the loop leaves by a clean exit (`--exit-interval`)."""
        try:
            with naming(self._flight):
                yield
        except SystemExit as stop:
            if stop.code in (None, 0):
                self._finish()
            raise
        self._finish()

    def _finish(self) -> None:
        """Collective. Writes what observers have left, and destroys the process groups."""
        for model in self._models:
            self.observers.finished_training(model)
        self.observers.finish(self.plan.modules, self.grids.creation_s)
        if self.guard is not None:
            self.guard.remove()
        self.executor.lanes.close()
        self.grids.destroy()
        dist.destroy_process_group()
        end_flight()

    @noted("set-up: optimizer")
    def _build_optimizer(
        self, config: Any, model_chunks: list[MosaicModel], config_overrides: Any = None, **_: Any
    ) -> ModuleOptimizers:
        (model,) = model_chunks
        optimizer = build_optimizer(
            tuple(self.plan.modules),
            {name: model.stages_of(name) for name in self.grids.collections},
            self.grids.collections,
            empty_stage(model.config, model.ddp_config, self.grids.alone_view()),
            None if self.plan.every_rank_runs_all else self.grids.world,
            config,
            config_overrides,
            not_finite=NotFinite.refuse if model.ddp_config.check_for_nan_in_grad else NotFinite.skip,
            around=partial(self._around_optimizer, model),
        )
        for name, factor in lr_mults_from_args(self._args, self.plan.modules).items():
            if name in optimizer.by_module and factor != 1:
                for group in optimizer.by_module[name].param_groups:
                    group["max_lr"], group["min_lr"] = factor * config.lr, factor * config.min_lr
        return optimizer

    def _around_optimizer(
        self, model: MosaicModel, optimizers: ModuleOptimizers, step: Callable[[], Stepped]
    ) -> Stepped:
        """The optimizer's step as a span of its own, between what observers want to see."""

        def work() -> Stepped:
            self.observers.finished_gradients(model, optimizers)
            return step()

        result = self.executor.record("~optimizer", work)
        self.observers.finished_step(self.executor.step, lambda: self.executor.spans, lambda: self.step.sent_bytes)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class DataProvider:
    """Datasets as iterators over global microbatches, in dataset order, the same on every rank."""

    make_datasets: MakeDatasets
    samples_per_microbatch: int
    is_distributed: ClassVar[bool] = True  # asked for by Megatron: to be called on every rank

    def __call__(self, num_samples: Sequence[int]) -> Sequence[Iterator[Samples] | None]:
        """Iterators over (train, valid, test). `num_samples`: how many of each the run will take."""
        args = get_args()
        starts = (args.consumed_train_samples, args.consumed_valid_samples, 0)
        return tuple(
            None if dataset is None else _microbatches(dataset, start, self.samples_per_microbatch)
            for dataset, start in zip(self.make_datasets(num_samples), starts, strict=True)
        )


@dataclass(kw_only=True)
class MosaicModelConfig(ModelConfig):
    """What `pretrain()` builds the model from: the runtime that knows the plan."""

    builder: ClassVar[str] = "megatron_mosaic.runtime.train.MosaicModelBuilder"
    _runtime: Any = None


class MosaicModelBuilder(ModelBuilder[MosaicModel, MosaicModelConfig]):
    """Builds the stages of this rank (official seam: `cfg_container.model`)."""

    def build_model(self, *args: Any, **kwargs: Any) -> MosaicModel:
        raise NotImplementedError("a plan's model is built whole: see build_distributed_models")

    def build_distributed_models(
        self, pg_collection: ProcessGroupCollection, ddp_config: Any = None, **_: Any
    ) -> list[MosaicModel]:
        return [self._model_config._runtime.build_model(ddp_config)]


def _open_lanes(backend: str, view: RankView, training: Schedule) -> Opened:
    """What this rank's tracks run on."""
    lanes = [f"{name}.{module.at.pp}" for name, module in view.modules.items()]
    shares = {name: module.placed.quota.share for name, module in view.modules.items()}
    opened = open_lanes(backend, modules_by_track(training.tracks, lanes), shares, lane_thread)
    for note in opened.notes:
        print_rank_0(f"> mosaic: {note}")
    return opened


def _observers_from_args(args: argparse.Namespace, view: RankView, world: dist.ProcessGroup) -> Observers:
    return Observers(
        units=UnitStatistics(view.plan.modules),
        meter=ActivationMeter() if args.mosaic_measure_activations else None,
        report=StepReport(args.mosaic_report, view.plan, world) if args.mosaic_report else None,
        periodic=_periodic_from_args(args, view.plan, world),
        dump=Dump(args.mosaic_dump_gradients, view.rank) if args.mosaic_dump_gradients else None,
    )


def _periodic_from_args(args: argparse.Namespace, plan: Plan, world: dist.ProcessGroup) -> PeriodicReport | None:
    """Where there is a directory or a TensorBoard to report to."""
    predicted = load_prediction(args.mosaic_predicted, lanes_of(plan)) if args.mosaic_predicted else None
    if not args.mosaic_report and not args.tensorboard_dir:
        if predicted is not None:
            print_rank_0("> mosaic: --mosaic-predicted says nothing without --mosaic-report or --tensorboard-dir")
        return None
    return PeriodicReport(
        plan,
        world,
        interval=args.mosaic_report_interval,
        directory=Path(args.mosaic_report) if args.mosaic_report else None,
        predicted=predicted,
        writer=get_tensorboard_writer,
    )


@noted("set-up: meeting the other ranks")
def _initialize_distributed(args: argparse.Namespace, timeout: timedelta) -> None:
    """Before `initialize_megatron`, because the groups are made from it; Megatron then finds it initialised."""
    if dist.is_initialized():
        return
    if not cpu.is_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(
            backend=args.distributed_backend, world_size=args.world_size, rank=args.rank, timeout=timeout
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT of {os.environ.get('MASTER_ADDR')}",
            got=f"{os.environ.get('MASTER_PORT')}, which another program listens at",
            expected="a free port: the ranks meet there",
            fix="choose another (torchrun --master-port), or end that program",
        ) from error


def _agree_on_schedule(executor: Executor, world: dist.ProcessGroup) -> None:
    """Collective over the world. ScheduleError on every rank whose schedule is not rank 0's."""
    text = [format_schedule(executor.training)]
    own = text[0]
    dist.broadcast_object_list(text, src=0, group=world)
    if text[0] != own:
        executor.accept(parse_schedule(text[0]))


def _microbatches(dataset: Any, start: int, size: int) -> Iterator[Samples]:
    """Consecutive blocks of `size` samples, from sample `start` on, wrapping at the end of the dataset."""
    while True:
        yield [dataset[i % len(dataset)] for i in range(start, start + size)]
        start += size
