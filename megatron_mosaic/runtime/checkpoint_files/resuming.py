"""Whether a run may go on from a checkpoint, and will be able to go on from those that it saves."""

from __future__ import annotations

import argparse
import io
from typing import Any

import torch

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound.checkpoint_io import RefusedPickle, load_object
from megatron_mosaic.runtime.checkpoint_files.inspection import Saved

_SCHEDULE = {  # of a scheduler's state -> the argument it comes from, and what it says; `steps` are samples
    "lr_warmup_steps": ("--lr-warmup-fraction or --lr-warmup-iters", "the learning rate rises over"),
    "lr_decay_steps": ("--lr-decay-iters, or --train-iters without it", "the learning rate falls over"),
    "lr_decay_style": ("--lr-decay-style", "the learning rate's curve is"),
    "start_wd": ("--start-weight-decay", "the first weight decay is"),
    "end_wd": ("--weight-decay or --end-weight-decay", "the last weight decay is"),
    "wd_incr_steps": ("--train-iters", "weight decay changes over"),
    "wd_incr_style": ("--weight-decay-incr-style", "the curve of weight decay is"),
}


def require_same_optimizer(saved: Saved, distributed: bool) -> None:
    """ConfigError if its optimizer state is of the other kind."""
    if saved.manifest is None or saved.manifest.distributed_optimizer == bool(distributed):
        return
    raise ConfigError(
        "--use-distributed-optimizer",
        got="set" if distributed else "not set",
        expected=f"{'set' if not distributed else 'not set'}, as in {saved.directory}",
        fix="use the saved run's optimizer, or load the parameters alone with --no-load-optim",
    )


def require_same_schedule(saved: Saved, scheduler: Any, args: argparse.Namespace) -> None:
    """Megatron asserts as much, once tensors are loaded and without the words to type."""
    if scheduler is None or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    before = saved.read_common_state().get("opt_param_scheduler") or {}
    for key, now in scheduler.state_dict().items():
        if key not in _SCHEDULE or before.get(key, now) == now:
            continue
        argument, says = _SCHEDULE[key]
        values = [now, before[key]]
        if key.endswith("_steps"):
            values = [f"{samples:g} samples ({samples / args.global_batch_size:g} steps)" for samples in values]
        raise ConfigError(
            argument,
            got=f"{says} {values[0]}",
            expected=f"{values[1]}, as in {saved.directory}",
            fix="go on with this run's values: --override-opt-param-scheduler; or with the saved ones: "
            "--use-checkpoint-opt-param-scheduler",
        )


def require_loadable(args: argparse.Namespace) -> None:
    """Every argument is saved: one that no load would build is an error now, not when the checkpoint is needed."""
    if _refusal_of(args) is None:
        return
    for key, value in vars(args).items():
        if (refusal := _refusal_of(value)) is not None:
            raise ConfigError(
                f"argument {key!r} of the script",
                got=f"{type(value).__name__}: {refusal}",
                expected="a value that a checkpoint can give back: numbers, text, lists, enumerations of Megatron's",
                fix="keep it elsewhere, or name its class with torch.serialization.add_safe_globals",
            )


def _refusal_of(value: object) -> RefusedPickle | None:
    """What a load of this value would say."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    try:
        load_object(stream, "")
    except RefusedPickle as error:
        return error
    return None
