"""A stock script under a plan of one module: the plan becomes Megatron's arguments, and Megatron lays the model out.

What its local layers lack (cp, norms under sequence parallelism) is put in; what a plan says beyond its arguments is
refused (`plan.validate.STOCK_SCRIPT`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_mosaic.adapters.arguments import script_defaults
from megatron_mosaic.adapters.script import run_main
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parallel_state_ext.rebound.rebind import (
    install_local_layers,
    install_vision_norm,
    rebind_arguments,
    rebind_pretrain,
    rebind_vocabulary_padding,
)
from megatron_mosaic.plan import Plan, Recompute
from megatron_mosaic.plan.validate import STOCK_SCRIPT, require_stock
from megatron_mosaic.runtime.arguments import APPLIED
from megatron_mosaic.runtime.flags.training import apply_training, typed_of
from megatron_mosaic.runtime.layers.attention import ContextParallelAttention
from megatron_mosaic.runtime.layers.norms import TorchNorm, split_over_tp

# A stock script's own arguments, and what a one-module plan says of them
_STOCK_ARGUMENTS = {
    "tensor_model_parallel_size": "tp",
    "context_parallel_size": "cp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
}


def run_script(script: str, arguments: Sequence[str], plan: Plan) -> None:
    """Run the script, laid out by Megatron as the plan says."""
    attach(plan)
    run_main(script, arguments)


def attach(plan: Plan) -> None:
    """Let the next script of this process be laid out as the plan says."""
    install_vision_norm(TorchNorm)
    ((_, module),) = plan.modules.items()
    install_local_layers(mark=split_over_tp, attention=ContextParallelAttention if module.layout.cp > 1 else None)
    _put_plan_into_arguments(plan)
    _let_provider_see_own_format()


def _let_provider_see_own_format() -> None:
    """pretrain_vlm.py asserts the checkpoint format `torch` while it builds its model, whatever is saved."""

    def pretrain(
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
        **others: Any,
    ) -> None:
        from megatron.training import get_args

        _require_engine_for(type(cfg_container.model).__name__)

        def provide(*words: Any, **named: Any) -> Any:
            args = get_args()
            own, args.ckpt_format = args.ckpt_format, "torch"
            try:
                return model_provider(*words, **named)
            finally:
                args.ckpt_format = own

        wrapped = provide if model_provider is not None else None
        stock(cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, wrapped, **others)

    stock = rebind_pretrain(pretrain)


def _require_engine_for(config: str) -> None:
    """ConfigError for models whose layers megatron-core has with Transformer Engine only."""
    if config == "HybridModelConfig" and not HAVE_TE:
        raise ConfigError(
            "this script",
            got="a HybridModel, without Transformer Engine",
            expected="Transformer Engine and mamba-ssm, of which its layers are made",
            fix="install both on a machine with GPUs, or train a GPT",
        )


def _put_plan_into_arguments(plan: Plan) -> None:
    """Replace Megatron's `add_megatron_arguments` (CPU defaults) and `validate_args` (the plan's layout)."""

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock_add(parser)
        parser.set_defaults(**script_defaults())
        return parser

    def validate(args: argparse.Namespace, defaults: Any = None) -> Any:
        if not getattr(args, APPLIED, False):
            apply_to_stock_script(args, plan)
        return stock_validate(args, defaults or {})

    stock_add, stock_validate = rebind_arguments(add=add_arguments, validate=validate)
    rebind_vocabulary_padding()


def apply_to_stock_script(args: argparse.Namespace, plan: Plan) -> None:
    """Write a one-module plan into the arguments of a script that Megatron lays out."""
    name, module = require_stock(plan, args.world_size)
    if module.recompute is Recompute.full:
        args.recompute_granularity, args.recompute_method, args.recompute_num_layers = "full", "uniform", 1
    elif module.recompute is Recompute.selective:
        args.recompute_granularity = "selective"
    if module.layout.vpp > 1:
        args.num_virtual_stages_per_pipeline_rank = module.layout.vpp
    for key, axis in _STOCK_ARGUMENTS.items():
        decided = getattr(module.layout, axis)
        if getattr(args, key) not in (1, decided):
            raise ConfigError(
                f"--{key.replace('_', '-')}",
                got=getattr(args, key),
                expected=f"{decided}, as in the plan",
                fix="leave the argument out: the plan decides",
            )
        setattr(args, key, decided)
    if args.sequence_parallel and not module.sequence_parallel:
        raise ConfigError(
            "--sequence-parallel",
            got="set",
            expected=f"not set: the plan says sequence_parallel: false of {name}",
            fix="leave the argument out, or change the plan",
        )
    args.sequence_parallel = module.sequence_parallel
    if getattr(args, "num_experts", None) and args.add_bias_linear and not HAVE_TE:
        raise ConfigError(
            "--num-experts",
            got="experts with biases, without Transformer Engine",
            expected="experts without: the backward of megatron-core's own does not run with them",
            fix="add --disable-bias-linear",
        )
    apply_training(args, plan.training, typed_of(args, {}), STOCK_SCRIPT)
    args.micro_batch_size, args.global_batch_size = plan.micro_batch_size, plan.global_batch_size
    if module.layout.ep > 1:
        args.expert_tensor_parallel_size = module.layout.etp
    if cpu.is_cpu():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
