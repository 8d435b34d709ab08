"""Checkpoints of a plan: Megatron's own save and load, told what a plan adds.

    iter_0000010/  Megatron's files  --then-->  mosaic_plan.yaml, mosaic_checkpoint.json  --then-->  tracker file
                   sharded by module            who saved it, which files are whole                  "10 is complete"

Any plan of the same workload may load it. Parameters and optimizer state are addressed by module and by their names in
the undivided module; RNG rng_states go back where a module's layout is the saved one and start afresh elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import checkpointing
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mosaic.errors import ConfigError, MosaicError
from megatron_mosaic.flight.process import noted
from megatron_mosaic.parallel_state_ext.rebound import checkpoint_io
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_checkpointing, rebound_sharded_save
from megatron_mosaic.parallel_state_ext.rng_states import PROCESS
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.checkpoint_files.inspection import Saved, check_share, inspect_checkpoint
from megatron_mosaic.runtime.checkpoint_files.manifest import (
    MANIFEST_FILE,
    Manifest,
    complete_iterations,
    describe,
    other_iterations,
    sum_up_files,
    write_manifest,
    write_plan,
)
from megatron_mosaic.runtime.checkpoint_files.resuming import (
    require_loadable,
    require_same_optimizer,
    require_same_schedule,
)
from megatron_mosaic.runtime.model import MosaicModel

_UNREADABLE = (CheckpointingException, CheckpointException, OSError, EOFError, pickle.UnpicklingError)


class Checkpoints:
    """Save and load of one run. Collective: every rank of the plan saves, and loads, at the same time."""

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        workload: Workload,
        world: dist.ProcessGroup,
        draw_rng_states: Callable[[int], Scopes],
    ) -> None:
        """`draw_rng_states(seed)`: new RNG streams of this rank's modules."""
        self._args, self._workload, self._world, self._draw_rng_states = args, workload, world, draw_rng_states
        self._saves_rng_states = not args.no_save_rng
        self._plan = replace(plan, digest=workload.digest, predicted=None)
        if (args.save or args.load) and args.ckpt_format != "torch_dist":
            raise ConfigError(
                "--ckpt-format",
                got=args.ckpt_format,
                expected="torch_dist: the one format whose shards know their module",
                fix="leave --ckpt-format out",
            )
        if args.save:
            self._require_writable(Path(args.save))
            require_loadable(args)
        if args.use_distributed_optimizer:
            args.dist_ckpt_optim_fully_reshardable = True  # the form that any layout can read
        checkpoint_io.install()
        rebind_checkpointing(save=self.save, load=self.load)

    @noted("step {1} lane ~save action ~save")
    def save(self, iteration: int, model: list[MosaicModel], *args: Any, **kwargs: Any) -> None:
        """Megatron's save, and our two files in its directory before the tracker file names it.

        ConfigError if files cannot be written: the checkpoint before stays the last.
        """

        def save_and_sign(state: Any, directory: Any, *rest: Any, **named: Any) -> Any:
            result = self._write(Path(directory), lambda: stock_save(state, directory, *rest, **named))
            self._sign(Path(directory), iteration)
            return result

        directory = Path(checkpointing.get_checkpoint_name(self._args.save, iteration, return_base_dir=True))
        self._on_every_rank(lambda: self._begin(directory), lambda error: self._not_saved(directory, describe(error)))
        asked = contextlib.nullcontext() if self._saves_rng_states else model[0].rng_states.only(())
        try:
            with rebound_sharded_save(save_and_sign) as stock_save, asked, _without_megatron_rng_states(self._args):
                checkpointing.save_checkpoint(iteration, model, *args, **kwargs)
        except OSError as error:  # of this rank alone: the others end with it
            raise self._not_saved(directory, describe(error)) from error

    @noted("set-up: lane ~load action ~load")
    def load(
        self, ddp_model: list[MosaicModel], optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """(iteration, floating-point operations so far). ConfigError on every rank if the checkpoint cannot be used."""
        load_dir = getattr(self._args, kwargs.get("load_arg", "load"))
        if self._args.pretrained_checkpoint and not checkpointing.checkpoint_exists(load_dir):
            load_dir, self._args.finetune = self._args.pretrained_checkpoint, True  # as Megatron does
        what = (ddp_model, optimizer, opt_param_scheduler)
        saved = self._agree_on_saved(load_dir)
        if saved is None:  # Megatron says so and starts from scratch, or leaves
            return checkpointing.load_checkpoint(*what, *args, **kwargs)  # type: ignore[no-any-return]
        is_release = Path(saved.directory).name == "release"
        if not (self._args.finetune or self._args.no_load_optim or is_release):
            require_same_optimizer(saved, self._args.use_distributed_optimizer)
            require_same_schedule(saved, opt_param_scheduler, self._args)
        resumes = not (self._args.finetune or self._args.no_load_rng)
        keeps = _modules_that_keep_rng_states(saved, self._plan) if resumes else frozenset()
        in_place = bool(keeps) and saved.plan is not None and _places(saved.plan) == _places(self._plan)
        rng_states = ddp_model[0].rng_states
        try:
            with _without_megatron_rng_states(self._args), rng_states.only({*keeps, PROCESS} if in_place else keeps):
                iteration, flops = checkpointing.load_checkpoint(*what, *args, **kwargs)
        except _UNREADABLE as error:
            raise ConfigError(
                f"checkpoint {saved.directory}",
                got=describe(_cause_of(error)),
                expected="a whole checkpoint of this model and optimizer",
                fix=other_iterations(Path(saved.directory)),
            ) from error
        others = [name for name in self._plan.modules if name not in keeps]
        if resumes and others:
            rng_states.renew(others, self._draw_rng_states(self._args.seed + iteration))
            print_rank_0(
                f"> mosaic: RNG streams of {', '.join(others)} start afresh from seed {self._args.seed} + iteration "
                f"{iteration}: the checkpoint has none for their layouts"
            )
        return iteration, flops

    def _begin(self, directory: Path) -> None:
        """A directory that this rank can write to. A checkpoint written over is not whole until it is signed again."""
        self._require_writable(directory)
        if dist.get_rank() == 0:
            (directory / MANIFEST_FILE).unlink(missing_ok=True)

    def _require_writable(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError(f"no right to write in {directory}")
        except OSError as error:
            raise self._not_saved(directory, describe(error)) from error

    def _not_saved(self, directory: Path, got: str) -> ConfigError:
        steps = complete_iterations(Path(self._args.save), besides=directory)
        last = f"the last complete one is iteration {steps[-1]}" if steps else "there is no complete one"
        return ConfigError(
            f"checkpoint {directory}",
            got=got,
            expected="a directory that every rank can write its files to",
            fix=f"make room there, or name another place with --save; {last}",
        )

    def _write(self, directory: Path, stock_save: Callable[[], Any]) -> Any:
        """Megatron's files. ConfigError on every rank if one of them could not write its tensors."""
        with checkpoint_io.write_errors() as errors:
            try:
                return stock_save()
            except CheckpointException as failure:  # on every rank, and says on none what it was
                failures = self._on_every_rank(lambda: [describe(_cause_of(error)) for error in errors], _unreadable)
                failed = [f"rank {rank}: {error}" for rank, found in enumerate(failures) for error in found]
                raise self._not_saved(directory, (failed or [describe(_cause_of(failure))])[0]) from failure

    def _sign(self, directory: Path, iteration: int) -> None:
        """Write our two files, the list of files last. Collective."""

        def together[T](work: Callable[[], T]) -> list[T]:
            return self._on_every_rank(work, lambda error: self._not_saved(directory, describe(error)))

        rank, num_ranks = dist.get_rank(), self._world.size()
        together(lambda: write_plan(directory, self._plan) if rank == 0 else None)
        sums = together(lambda: sum_up_files(directory, rank, num_ranks))
        files = {name: found for part in sums for name, found in part.items()}
        manifest = Manifest(
            iteration=iteration,
            distributed_optimizer=bool(self._args.use_distributed_optimizer),
            rng=self._saves_rng_states,
            bytes_by_file={name: size for name, (size, _) in files.items()},
            crc32_by_file={name: crc32 for name, (_, crc32) in files.items()},
        )
        together(lambda: write_manifest(directory, self._plan, manifest) if rank == 0 else None)

    def _agree_on_saved(self, load_dir: str | None) -> Saved | None:
        """What rank 0 found, once every rank has looked at its part of it. None: there is nothing to load."""
        rank = dist.get_rank()
        found: list[Saved | None] = [None]

        def look() -> None:
            if rank == 0:
                found[0] = inspect_checkpoint(load_dir, self._args.ckpt_step, self._workload)

        self._on_every_rank(look, _unreadable)
        dist.broadcast_object_list(found, src=0, group=self._world)
        if (saved := found[0]) is not None:
            self._on_every_rank(lambda: check_share(saved, rank, self._world.size()), _unreadable)
        return saved

    def _on_every_rank[T](self, work: Callable[[], T], refusal_of: Callable[[OSError], ConfigError]) -> list[T]:
        """What `work` gave on each rank; if it failed on one, that rank's error on all. Collective."""
        error: dict[str, str] | None = None
        result: Any = None
        try:
            result = work()
        except MosaicError as refusal:
            error = refusal.as_dict()
        except OSError as failure:
            error = refusal_of(failure).as_dict()
        outcomes: list[Any] = [None] * self._world.size()
        dist.all_gather_object(outcomes, (error, result), group=self._world)
        for failed, _ in outcomes:
            if failed is not None:
                failed.pop("error")
                raise ConfigError(**failed)
        return [given for _, given in outcomes]


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(
        f"checkpoint file {error.filename}",
        got=f"rank {dist.get_rank()}: {describe(error)}",
        expected="a file that every rank can read",
        fix="look at the directory and its permissions",
    )


def _cause_of(error: BaseException) -> BaseException:
    """What torch put inside its own exception, or raised another over: the file system's word if there is one."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    before: BaseException | None = error
    while before is not None and not isinstance(before, OSError):
        before = before.__context__
    return before or error


def _modules_that_keep_rng_states(saved: Saved, plan: Plan) -> frozenset[str]:
    """Modules whose ranks have the same places as when the checkpoint was saved."""
    if saved.plan is None or saved.manifest is None or not saved.manifest.rng:
        return frozenset()
    return frozenset(name for name, module in plan.modules.items() if saved.plan.modules[name].layout == module.layout)


def _places(plan: Plan) -> tuple[int, dict[str, Any]]:
    return plan.world_size, {name: (module.ranks, module.layout) for name, module in plan.modules.items()}


@contextlib.contextmanager
def _without_megatron_rng_states(args: argparse.Namespace) -> Iterator[None]:
    """Megatron would give every rank the streams of rank 0, and leave quietly if that rank has none."""
    before = args.no_save_rng, args.no_load_rng
    args.no_save_rng = args.no_load_rng = True
    try:
        yield
    finally:
        args.no_save_rng, args.no_load_rng = before
