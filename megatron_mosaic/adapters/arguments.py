"""The arguments of a script whose modules a plan lays out: what the script's own parsing makes of them.

    script --parse_and_validate_args--> Megatron's parser + ours --validate_args--> judged, the plan written into them

The table of `runtime.flags` judges what Megatron's loop and the runtime do with an argument. What a layer or the data
is made of is the script's to say.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.utils import print_rank_0

from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.parallel_state_ext.rebound import cpu, guard
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_arguments, rebind_vocabulary_padding
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.arguments import APPLIED, apply_backbone
from megatron_mosaic.runtime.flags.command_line import UNDER_A_PLAN, CommandLine
from megatron_mosaic.runtime.flags.judge import decided_by, judge
from megatron_mosaic.runtime.flags.mosaic import add_mosaic_arguments
from megatron_mosaic.runtime.flags.table import Verdict, arguments_by_dest
from megatron_mosaic.runtime.flags.training import apply_training, decide_arguments

SEEN_BY_SCRIPT = "mosaic_seen_by_script"  # set on the arguments: values that the script sees, and the loop does not
BACKBONE = "llm"  # of every workload that an adapter makes

# What the table refuses for the reference model, and a script builds by itself.
_BUILT_BY_SCRIPT = frozenset(
    {
        *("encoder_num_layers", "decoder_num_layers", "encoder_seq_length", "decoder_seq_length"),
        *("make_vocab_size_divisible_by", "padded_vocab_size", "pad_vocab_size"),
        *("qk_layernorm", "apply_layernorm_1p", "cross_entropy_loss_fusion"),
    }
)
# Where Transformer Engine is missing: what a script cannot be built with.
WITHOUT_ENGINE: Mapping[str, object] = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
}


def script_defaults() -> dict[str, object]:
    """Defaults of Megatron's arguments that this machine needs, so that the user need not pass them."""
    return {**({} if HAVE_TE else WITHOUT_ENGINE), **(cpu.ARGUMENT_DEFAULTS if cpu.is_cpu() else {})}


def refuse_flags(args: argparse.Namespace) -> None:
    """ConfigError for flags of a script that would change its batches or its layers' communication."""
    for flag in ("use_packed_sequence", "decoder_tp_comm_overlap"):
        if getattr(args, flag, False):
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(
                name,
                got="set",
                expected="left out: not supported under a plan of several modules",
                fix=f"leave {name} out",
            )


def put_plan_into_arguments(plan: Plan) -> None:
    """Replace Megatron's `add_megatron_arguments` and `validate_args` for a script under a plan of several modules."""
    parsers: list[argparse.ArgumentParser] = []

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_mosaic_arguments(stock_add(parser))
        parser.set_defaults(**script_defaults(), mosaic_guard=guard.is_wanted())
        parsers.append(parser)
        return parser

    def validate(args: argparse.Namespace, defaults: Any = None) -> Any:
        if getattr(args, APPLIED, False):
            return stock_validate(args, defaults or {})
        for key, value in (defaults or {}).items():
            if getattr(args, key, None) is None:
                setattr(args, key, value)
        _apply(args, plan, vars(parsers[-1].parse_known_args([])[0]) | (defaults or {}))
        return args

    stock_add, stock_validate = rebind_arguments(add=add_arguments, validate=validate)
    rebind_vocabulary_padding()


def _apply(args: argparse.Namespace, plan: Plan, usual: Mapping[str, Any]) -> None:
    """Judge what was typed and write the plan into the arguments. `usual`: the values of an empty command line."""
    if BACKBONE not in plan.modules:
        raise PlanError(
            "modules",
            got=list(plan.modules),
            expected=f"{BACKBONE} and the modules of the script's model (llava: vision; mimo: its modalities)",
            fix=f"name the backbone {BACKBONE}",
        )
    rows = arguments_by_dest()
    typed = {key: value for key, value in vars(args).items() if key in usual and value != usual[key]}
    if typed.get("dataloader_type") not in (None, "single", "external"):
        raise ConfigError(
            "--dataloader-type",
            got=args.dataloader_type,
            expected="single or external: every rank reads all samples in order",
            fix="leave it out",
        )
    judged = {
        key: value
        for key, value in typed.items()
        if key in rows and rows[key].verdict is not Verdict.irrelevant
        if key not in _BUILT_BY_SCRIPT and key != "dataloader_type"
    }
    apply_training(args, plan.training, judged)
    decided = {**decided_by(plan, BACKBONE), **decide_arguments(plan.training)}
    judge(CommandLine(typed=judged, defaults=usual), decided=decided)
    if not args.calculate_per_token_loss:
        print_rank_0(
            "> mosaic: gradients are divided once, by the loss tokens of the whole batch (--calculate-per-token-loss); "
            "Megatron's default divides in every microbatch, which depends on the layout"
        )
        args.calculate_per_token_loss = True
    setattr(args, SEEN_BY_SCRIPT, {"dataloader_type": args.dataloader_type or "single"})
    args.dataloader_type = UNDER_A_PLAN["dataloader_type"]
    apply_backbone(args, plan, BACKBONE)
