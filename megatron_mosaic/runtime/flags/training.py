"""A plan's `training` as Megatron's own arguments: what it decides, and who contradicts it.

Needs neither torch nor Megatron, so that a command line is refused before any process starts. The overlaps of
`training` are what the cost model counts on; nothing here follows from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.plan.validate import RUNTIME, Limits, require_trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flag:
    """How an argument of Megatron is written, and its value where nobody sets it."""

    text: str
    default: str | bool | None


FLAGS: Mapping[str, _Flag] = {
    "bf16": _Flag(text="--bf16", default=False),
    "fp16": _Flag(text="--fp16", default=False),
    "fp8": _Flag(text="--fp8-format", default=None),
    "fp8_recipe": _Flag(text="--fp8-recipe", default="delayed"),
    "fp4": _Flag(text="--fp4-format", default=None),
    "use_distributed_optimizer": _Flag(text="--use-distributed-optimizer", default=False),
}
# What each format sets beside the defaults. Recipes as in Megatron Bridge: fp8 with current scaling
_OF_FORMAT: Mapping[Format, Mapping[str, str | bool]] = {
    Format.fp32: {},
    Format.fp16: {"fp16": True},
    Format.bf16: {"bf16": True},
    Format.fp8: {"bf16": True, "fp8": "hybrid", "fp8_recipe": "tensorwise"},
    Format.mxfp8: {"bf16": True, "fp8": "e4m3", "fp8_recipe": "mxfp8"},
    Format.nvfp4: {"bf16": True, "fp4": "e2m1"},
}
_ENGINE = "transformer_engine"
_OF_SHARDING: Mapping[Sharding, Mapping[str, str | bool]] = {
    Sharding.none: {},
    Sharding.optimizer: {"use_distributed_optimizer": True},
}


def decide_arguments(training: TrainingSetup | None, limits: Limits = RUNTIME) -> dict[str, str | bool | None]:
    """Megatron argument -> its value under a plan with this training; nothing where the plan does not say.

    PlanError for what is beyond the limits.
    """
    if training is None:
        return {}
    require_trainable(training, limits)
    if training.format.is_low and find_spec("transformer_engine") is None:
        raise PlanError(
            "training.format",
            got=training.format,
            expected="fp32 or bf16: products of 8 and 4 bits are Transformer Engine's, which is not installed",
            fix="install the extra `cuda`, or set format: bf16",
        )
    decided = {**_OF_FORMAT[training.format], **_OF_SHARDING[training.sharding]}
    return {key: decided.get(key, flag.default) for key, flag in FLAGS.items()}


def apply_training(
    args: argparse.Namespace,
    training: TrainingSetup | None,
    typed: Mapping[str, object],
    limits: Limits = RUNTIME,
) -> None:
    """Write a plan's training into Megatron's arguments. ConfigError where what the user `typed` contradicts it."""
    if training and training.format.is_low and getattr(args, "transformer_impl", _ENGINE) != _ENGINE:
        raise ConfigError(
            "--transformer-impl",
            got=args.transformer_impl,
            expected=f"{_ENGINE}: other layers compute in 16 bits, and the plan says format: {training.format}",
            fix="train on GPUs with Transformer Engine, or set format: bf16",
        )
    for key, value in decide_arguments(training, limits).items():
        if typed.get(key, value) != value:
            text = FLAGS[key].text
            is_switch = isinstance(value, bool)
            raise ConfigError(
                text,
                got="set" if is_switch else typed[key],
                expected=f"{'not set' if is_switch else value or 'not set'}: the plan says {_said(training, key)}",
                fix=f"leave {text} out, or change the plan",
            )
        setattr(args, key, value)


def typed_of(args: argparse.Namespace, defaults: Mapping[str, object]) -> dict[str, object]:
    """What the user set among the arguments that a plan's training decides."""
    usual = {key: defaults.get(key, flag.default) for key, flag in FLAGS.items()}
    return {key: getattr(args, key) for key in FLAGS if getattr(args, key, usual[key]) != usual[key]}


def _said(training: TrainingSetup | None, key: str) -> str:
    assert training is not None  # else nothing is decided
    return f"sharding: {training.sharding}" if key == "use_distributed_optimizer" else f"format: {training.format}"
