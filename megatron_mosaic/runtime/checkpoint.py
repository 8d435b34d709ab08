"""Checkpoints of a plan: Megatron's own save and load, told what a plan adds.

    iter_0000010/  Megatron's files  --then-->  mosaic_plan.yaml, mosaic_checkpoint.json  --then-->  tracker file
                   sharded by module            who saved it, which files are whole                  "10 is complete"

Any plan of the same workload may load it. Parameters and optimizer state are addressed by module and by their names in
the undivided module; RNG rng_states go back where a module's layout is the saved one and start afresh elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import checkpointing
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mosaic.errors import ConfigError, MosaicError
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_checkpointing, rebound_sharded_save
from megatron_mosaic.parallel_state_ext.rng_states import PROCESS
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.model import MosaicModel

PLAN_FILE = "mosaic_plan.yaml"
MANIFEST_FILE = "mosaic_checkpoint.json"
_UNREADABLE = (CheckpointingException, CheckpointException, OSError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself beside its plan. `bytes_by_file`: every file of Megatron's."""

    iteration: int
    distributed_optimizer: bool
    rng: bool
    bytes_by_file: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that may be loaded. Without plan and manifest: one that was saved without a plan."""

    directory: str
    plan: Plan | None = None
    manifest: Manifest | None = None


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
        if args.use_distributed_optimizer:
            args.dist_ckpt_optim_fully_reshardable = True  # the form that any layout can read
        rebind_checkpointing(save=self.save, load=self.load)

    def save(self, iteration: int, model: list[MosaicModel], *args: Any, **kwargs: Any) -> None:
        """Megatron's save, and our two files in its directory before the tracker file names it."""

        def save_and_sign(state: Any, directory: Any, *rest: Any, **named: Any) -> Any:
            if dist.get_rank() == 0:  # a checkpoint that is written over is not whole until it is signed again
                (Path(directory) / MANIFEST_FILE).unlink(missing_ok=True)
            dist.barrier(group=self._world)
            result = stock_save(state, directory, *rest, **named)
            if dist.get_rank() == 0:
                self._sign(Path(directory), iteration)
            return result

        asked = contextlib.nullcontext() if self._saves_rng_states else model[0].rng_states.only(())
        with rebound_sharded_save(save_and_sign) as stock_save, asked, _without_megatron_rng_states(self._args):
            checkpointing.save_checkpoint(iteration, model, *args, **kwargs)

    def load(self, ddp_model: list[MosaicModel], optimizer: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(iteration, floating-point operations so far). ConfigError on every rank if the checkpoint cannot be used."""
        load_dir = getattr(self._args, kwargs.get("load_arg", "load"))
        if self._args.pretrained_checkpoint and not checkpointing.checkpoint_exists(load_dir):
            load_dir, self._args.finetune = self._args.pretrained_checkpoint, True  # as Megatron does
        saved = self._agree_on_saved(load_dir)
        if saved is None:  # Megatron says so and starts from scratch, or leaves
            return checkpointing.load_checkpoint(ddp_model, optimizer, *args, **kwargs)  # type: ignore[no-any-return]
        resumes = not (self._args.finetune or self._args.no_load_rng)
        keeps = _modules_that_keep_rng_states(saved, self._plan) if resumes else frozenset()
        in_place = bool(keeps) and saved.plan is not None and _places(saved.plan) == _places(self._plan)
        rng_states = ddp_model[0].rng_states
        try:
            with _without_megatron_rng_states(self._args), rng_states.only({*keeps, PROCESS} if in_place else keeps):
                iteration, flops = checkpointing.load_checkpoint(ddp_model, optimizer, *args, **kwargs)
        except _UNREADABLE as error:
            raise ConfigError(
                f"checkpoint {saved.directory}",
                got=f"{type(error).__name__}: {_first_line(error)}",
                expected="a whole checkpoint of this model and optimizer",
                fix=_other_iterations(Path(load_dir or ""), Path(saved.directory)),
            ) from error
        others = [name for name in self._plan.modules if name not in keeps]
        if resumes and others:
            rng_states.renew(others, self._draw_rng_states(self._args.seed + iteration))
            print_rank_0(
                f"> mosaic: RNG streams of {', '.join(others)} start afresh from seed {self._args.seed} + iteration "
                f"{iteration}: the checkpoint has none for their layouts"
            )
        return iteration, flops

    def _sign(self, directory: Path, iteration: int) -> None:
        """Write our two files, whole or not at all."""
        manifest = {
            "iteration": iteration,
            "workload": self._workload.name,
            "digest": self._workload.digest,
            "distributed_optimizer": bool(self._args.use_distributed_optimizer),
            "rng": self._saves_rng_states,
            "bytes_by_file": _sizes(directory),
        }
        partial = directory / f"{PLAN_FILE}.partial"
        save_plan(self._plan, partial)
        os.replace(partial, directory / PLAN_FILE)
        partial = directory / f"{MANIFEST_FILE}.partial"
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(partial, directory / MANIFEST_FILE)

    def _agree_on_saved(self, load_dir: str | None) -> Saved | None:
        """What rank 0 found; its error on every rank. None: there is nothing to load."""
        outcome: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                outcome = [inspect_checkpoint(load_dir, self._args.ckpt_step, self._workload)]
                if outcome[0] is not None and not (self._args.finetune or self._args.no_load_optim):
                    _require_same_optimizer(outcome[0], self._args.use_distributed_optimizer)
            except (MosaicError, OSError) as error:  # the others wait for an answer
                outcome = [(error if isinstance(error, MosaicError) else _unreadable(load_dir, error)).as_dict()]
        dist.broadcast_object_list(outcome, src=0, group=self._world)
        if isinstance(outcome[0], dict):
            outcome[0].pop("error")
            raise ConfigError(**outcome[0])
        return outcome[0]  # type: ignore[no-any-return]


def inspect_checkpoint(load_dir: str | None, step: int | None, workload: Workload) -> Saved | None:
    """The checkpoint that the tracker file (or `step`) names, once it is seen to be whole and of this workload."""
    if load_dir is None:
        return None
    tracked = _tracked_iteration(Path(load_dir))  # Megatron reads it even if `step` overrides it
    iteration = step or tracked
    if iteration is None:
        return None
    directory = Path(checkpointing.get_checkpoint_name(load_dir, iteration, return_base_dir=True))
    if iteration == 0:  # a release: made by a converter, not by a run
        directory = Path(checkpointing.get_checkpoint_name(load_dir, 0, release=True, return_base_dir=True))
    if not directory.is_dir():
        raise ConfigError(
            f"checkpoint {directory}",
            got="no such directory",
            expected=f"the checkpoint that {load_dir} names as its last",
            fix=_other_iterations(Path(load_dir), directory),
        )
    if not (directory / PLAN_FILE).exists() and not (directory / MANIFEST_FILE).exists():
        print_rank_0(f"WARNING: {directory} has no {PLAN_FILE}: not saved under a plan, its workload is not checked")
        return Saved(directory=str(directory))
    plan, manifest = load_plan(directory / PLAN_FILE), _read_manifest(directory / MANIFEST_FILE)
    for what, got, expected in (
        ("workload", plan.workload, workload.name),
        ("digest", plan.digest, workload.digest),
    ):
        if got != expected:
            raise ConfigError(
                f"{directory / PLAN_FILE}: {what}",
                got=got,
                expected=f"{expected}, the {what} of {workload.name!r} as this run builds it",
                fix="load a checkpoint of this workload, or train with the sizes of the saved one",
            )
    found = _sizes(directory)
    for name, size in manifest.bytes_by_file.items():
        if found.get(name) != size:
            raise ConfigError(
                f"checkpoint file {directory / name}",
                got="no such file" if name not in found else f"{found[name]} bytes",
                expected=f"{size} bytes, as saved at iteration {manifest.iteration}",
                fix=_other_iterations(Path(load_dir), directory),
            )
    return Saved(directory=str(directory), plan=plan, manifest=manifest)


def _require_same_optimizer(saved: Saved, distributed: bool) -> None:
    if saved.manifest is None or saved.manifest.distributed_optimizer == bool(distributed):
        return
    raise ConfigError(
        "--use-distributed-optimizer",
        got="set" if distributed else "not set",
        expected=f"{'set' if not distributed else 'not set'}, as in {saved.directory}",
        fix="use the saved run's optimizer, or load the parameters alone with --no-load-optim",
    )


def _tracked_iteration(load_dir: Path) -> int | None:
    """The iteration that the tracker file calls complete; 0 for a release; None without a tracker file."""
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(str(load_dir)))
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return 0
    if not text.isdecimal():
        raise ConfigError(
            str(tracker),
            got=repr(text[:40]),
            expected="the number of the last complete iteration",
            fix=f"write there one of {_complete_iterations(load_dir, None)}, which are complete",
        )
    return int(text)


def _read_manifest(path: Path) -> Manifest:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{key: data[key] for key in Manifest.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            str(path),
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="the list of the checkpoint's files",
            fix="load another iteration with --ckpt-step: this one was not saved to its end",
        ) from error


def _other_iterations(load_dir: Path, directory: Path | None) -> str:
    """Which checkpoints beside this one were saved to their end."""
    steps = _complete_iterations(load_dir, directory)
    return f"use --ckpt-step {steps[-1]}, which is complete" if steps else "load another checkpoint"


def _complete_iterations(load_dir: Path, besides: Path | None) -> list[int]:
    found = [path.parent for path in load_dir.glob(f"iter_*/{MANIFEST_FILE}") if path.parent != besides]
    steps = [path.name.removeprefix("iter_") for path in found]
    return sorted(int(step) for step in steps if step.isdecimal())


def _modules_that_keep_rng_states(saved: Saved, plan: Plan) -> frozenset[str]:
    """Modules whose ranks have the same places as when the checkpoint was saved."""
    if saved.plan is None or saved.manifest is None or not saved.manifest.rng:
        return frozenset()
    return frozenset(name for name, module in plan.modules.items() if saved.plan.modules[name].layout == module.layout)


def _places(plan: Plan) -> tuple[int, dict[str, Any]]:
    return plan.world_size, {name: (module.ranks, module.layout) for name, module in plan.modules.items()}


def _sizes(directory: Path) -> dict[str, int]:
    """File -> bytes, ours left out."""
    return {
        path.name: path.stat().st_size
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith((PLAN_FILE, MANIFEST_FILE))
    }


def _unreadable(load_dir: str | None, error: OSError) -> ConfigError:
    return ConfigError(
        f"checkpoint {load_dir}",
        got=f"{type(error).__name__}: {_first_line(error)}",
        expected="files that rank 0 can read",
        fix="look at the directory and its permissions",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


@contextlib.contextmanager
def _without_megatron_rng_states(args: argparse.Namespace) -> Iterator[None]:
    """Megatron would give every rank the streams of rank 0, and leave quietly if that rank has none."""
    before = args.no_save_rng, args.no_load_rng
    args.no_save_rng = args.no_load_rng = True
    try:
        yield
    finally:
        args.no_save_rng, args.no_load_rng = before
