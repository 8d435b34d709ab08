"""Whether the arguments describe a curve of the learning rate: Megatron's scheduler asserts as much, on a rank."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_mosaic.errors import ConfigError


def require_learning_rate(args: argparse.Namespace) -> None:
    """ConfigError unless the rate can rise, fall and end as the arguments say. Nothing typed about its length: true."""
    in_samples = args.train_samples is not None
    unit = "samples" if in_samples else "iters"
    decay, train = getattr(args, f"lr_decay_{unit}"), getattr(args, f"train_{unit}")
    length = train if decay is None else decay
    if length is None or args.lr is None:
        return  # Megatron asks for them
    where = f"--train-{unit}" if decay is None else f"--lr-decay-{unit}"
    _require(length > 0, where, length, "at least 1: the learning rate's curve has this length", "raise it")
    fraction = args.lr_warmup_fraction
    warmup = getattr(args, f"lr_warmup_{unit}") if fraction is None else fraction * length
    _require(
        0 <= warmup < length,
        f"--lr-warmup-{unit}" if fraction is None else "--lr-warmup-fraction",
        warmup if fraction is None else fraction,
        f"a warm-up shorter than the learning rate's curve, which is {length} {_WORDS[unit]} ({where})",
        f"shorten it, or lengthen the curve with --lr-decay-{unit}",
    )
    _require(0 <= args.min_lr <= args.lr, "--min-lr", args.min_lr, f"from 0 to {args.lr}, --lr", "lower it")
    _require(args.lr_warmup_init <= args.lr, "--lr-warmup-init", args.lr_warmup_init, f"at most {args.lr}", "lower it")


_WORDS = {"iters": "steps", "samples": "samples"}


def _require(holds: bool, where: str, got: Any, expected: str, fix: str) -> None:
    if not holds:
        raise ConfigError(where, got=got, expected=expected, fix=fix)
