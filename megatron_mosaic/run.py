"""`torchrun ... -m megatron_mosaic.run SCRIPT.py MEGATRON-ARGS --mosaic-plan PLAN`: a pretrain script under a plan.

A script that brings a ModelDefinition (scripts/pretrain_any2any.py) gets the plan through $MOSAIC_PLAN and obeys all of
it. A stock script has one model. A plan with one module on all ranks becomes Megatron's own arguments; a plan with more
modules lays the model out where an adapter knows its class (`adapters/`).
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import ConfigError, MosaicError, RankFailure
from megatron_mosaic.flight.process import begin_early
from megatron_mosaic.launch.slurm.environment import take_rank_from_slurm
from megatron_mosaic.parallel_state_ext.rebound import checkpoint_io, cpu
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_arguments, require_supported_megatron
from megatron_mosaic.plan import Plan, Recompute
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.validate import STOCK_SCRIPT, require_stock
from megatron_mosaic.runtime.arguments import APPLIED, PLAN_VARIABLE
from megatron_mosaic.runtime.flags.training import apply_training, typed_of

# A stock script's own arguments, and what a one-module plan says of them
_STOCK_ARGUMENTS = {
    "tensor_model_parallel_size": "tp",
    "context_parallel_size": "cp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
}


def main(words: Sequence[str]) -> int:
    """Run the script. Exit status 2 if plan or arguments are wrong; the script's own otherwise."""
    try:
        take_rank_from_slurm()
        begin_early()
        script, plan_path, arguments = _split_command_line(words)
        plan = load_plan(plan_path)
        os.environ[PLAN_VARIABLE] = str(plan_path)
        require_supported_megatron()
        cpu.install()
        checkpoint_io.install()
        run_script(script, arguments, plan)
    except RankFailure:
        raise
    except MosaicError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_script(script: str, arguments: Sequence[str], plan: Plan) -> None:
    """The script under the plan, in this process."""
    if len(plan.modules) > 1:
        from megatron_mosaic.adapters import script as adapted

        adapted.run_script(script, arguments, plan)
        return
    _put_plan_into_arguments(plan)
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _split_command_line(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """(script, plan file, the script's arguments)."""
    parser = argparse.ArgumentParser(prog="megatron_mosaic.run", add_help=False, allow_abbrev=False)
    parser.add_argument("--mosaic-plan", default=os.environ.get(PLAN_VARIABLE))
    known, rest = parser.parse_known_args(list(words))
    if not rest or not Path(rest[0]).is_file():
        raise ConfigError(
            "megatron_mosaic.run",
            got=rest[0] if rest else "no script",
            expected="SCRIPT.py MEGATRON-ARGS --mosaic-plan PLAN",
            fix="give the path of a Megatron pretrain script first",
        )
    if known.mosaic_plan is None:
        raise ConfigError(
            "--mosaic-plan", got="nothing", expected=f"a plan file, or ${PLAN_VARIABLE}", fix="add --mosaic-plan PLAN"
        )
    if "--yaml-cfg" in rest:
        raise ConfigError(
            "--yaml-cfg",
            got="set",
            expected="command-line arguments: a YAML file would replace all of them",
            fix="write the YAML's values as arguments",
        )
    return rest[0], known.mosaic_plan, rest[1:]


def _put_plan_into_arguments(plan: Plan) -> None:
    """Replace Megatron's `add_megatron_arguments` (CPU defaults) and `validate_args` (the plan's layout)."""

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock_add(parser)
        if cpu.is_cpu():
            parser.set_defaults(**cpu.ARGUMENT_DEFAULTS)
        return parser

    def validate(args: argparse.Namespace, defaults: Any = None) -> Any:
        if not getattr(args, APPLIED, False):
            apply_to_stock_script(args, plan)
        return stock_validate(args, defaults or {})

    stock_add, stock_validate = rebind_arguments(add=add_arguments, validate=validate)


def apply_to_stock_script(args: argparse.Namespace, plan: Plan) -> None:
    """Write a one-module plan into the arguments of a script that Megatron lays out."""
    name, module = require_stock(plan, args.world_size)
    if module.recompute is Recompute.full:
        args.recompute_granularity, args.recompute_method, args.recompute_num_layers = "full", "uniform", 1
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
    apply_training(args, plan.training, typed_of(args, {}), STOCK_SCRIPT)
    args.micro_batch_size, args.global_batch_size = plan.micro_batch_size, plan.global_batch_size
    if module.layout.ep > 1:
        args.expert_tensor_parallel_size = module.layout.etp
    if cpu.is_cpu():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
