"""The plugin's own arguments, as ordinary arguments of a Megatron script."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection

from megatron_mosaic.errors import ConfigError

PLAN_VARIABLE = "MOSAIC_PLAN"
QUOTA_BACKENDS = ("auto", "green_context", "streams", "cpu", "none")  # colocation/backend.py, which needs torch


def add_mosaic_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, with the plugin's arguments added if it does not have them."""
    if "--mosaic-plan" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group("mosaic", "layouts and placement of modules")
    group.add_argument(
        "--mosaic-plan", metavar="FILE", help=f"plan file; default ${PLAN_VARIABLE}, else every module dp"
    )
    group.add_argument("--mosaic-schedule", metavar="FILE", help="text of the schedule of training steps")
    group.add_argument(
        "--mosaic-quota-backend",
        default=QUOTA_BACKENDS[0],
        choices=QUOTA_BACKENDS,
        help="what runs modules beside each other on one device; none: they take turns",
    )
    group.add_argument(
        "--mosaic-report", metavar="DIR", help="write losses, scalars of modules and timelines here, all ranks the same"
    )
    group.add_argument(
        "--mosaic-report-interval",
        type=_at_least_one,
        default=100,
        metavar="STEPS",
        help="after so many steps, say what lanes took (default 100), also to --tensorboard-dir",
    )
    group.add_argument("--mosaic-predicted", metavar="FILE", help="what was predicted, to say it beside")
    group.add_argument(
        "--mosaic-dump-gradients",
        metavar="DIR",
        help="write gradients of every step and the last parameters (parity checks)",
    )
    group.add_argument(
        "--mosaic-lr-mult",
        nargs="+",
        default=[],
        metavar="MODULE=FACTOR",
        help="learning rate of a module, relative to --lr (and --min-lr)",
    )
    group.add_argument(
        "--mosaic-guard",
        action="store_true",
        help="raise where a module's code reads Megatron's global process groups, or where a message is of other "
        "samples than the receiver has; default $MOSAIC_GUARD",
    )
    group.add_argument("--mosaic-measure-activations", action="store_true", help="report saved activation bytes")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps, at least 1")
    return int(text)


def lr_mults_from_args(args: argparse.Namespace, modules: Collection[str]) -> dict[str, float]:
    """Module -> factor of its learning rate; 1 where none is given."""
    factors = dict.fromkeys(modules, 1.0)
    for word in args.mosaic_lr_mult:
        name, _, number = word.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if name not in factors or not 0 <= factor < math.inf:
            raise ConfigError(
                "--mosaic-lr-mult",
                got=word,
                expected=f"MODULE=FACTOR, MODULE one of {list(modules)}, FACTOR at least 0",
                fix="correct it, or freeze a module that shall not learn",
            )
        factors[name] = factor
    return factors
