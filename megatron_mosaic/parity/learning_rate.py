"""The learning rate of every step, written down anew: the oracle of Megatron's scheduler in `mosaic check`."""

from __future__ import annotations

import math
from argparse import Namespace


def learning_rate_at(args: Namespace, step: int, factor: float = 1.0) -> float:
    """Of step `step` (from 0), for a module whose rate is `factor` times --lr and --min-lr.

    A straight line from --lr-warmup-init up to the rate, then constant, a straight line or half a cosine down to the
    least. Lengths are in steps: a check knows no samples (the table of `runtime.flags` refuses the rest).
    """
    top, least = factor * args.lr, factor * args.min_lr
    length = args.lr_decay_iters or args.train_iters
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else args.lr_warmup_fraction * length
    if warmup > 0 and step <= warmup:
        return float(args.lr_warmup_init + (top - args.lr_warmup_init) * step / warmup)
    if args.lr_decay_style == "constant":
        return float(top)
    if step > length:
        return float(least)
    done = (step - warmup) / (length - warmup)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_decay_style]
    return float(least + (top - least) * left)
