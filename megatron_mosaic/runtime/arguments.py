"""Megatron's arguments under a plan: parsed, judged by the table of `flags`, and the plan written into them."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import megatron.training.arguments as megatron_arguments
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import print_rank_0

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.slurm.environment import describe_start, take_rank_from_slurm
from megatron_mosaic.parallel_state_ext.rebound import cpu, guard
from megatron_mosaic.parallel_state_ext.rebound.rebind import remember_docstrings, require_supported_megatron
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice, validate_plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.flags.command_line import (
    UNDER_A_PLAN,
    AddArguments,
    CommandLine,
    emptied_by,
    read_command_line,
)
from megatron_mosaic.runtime.flags.judge import decided_by, facts_of, judge
from megatron_mosaic.runtime.flags.mosaic import PLAN_VARIABLE, add_mosaic_arguments
from megatron_mosaic.runtime.flags.mosaic import lr_mults_from_args as lr_mults_from_args
from megatron_mosaic.runtime.flags.table import Verdict, load_arguments
from megatron_mosaic.runtime.flags.training import apply_training, decide_arguments

APPLIED = "mosaic_plan_applied"  # set on the arguments once a plan is in them

# Megatron's validation sets these by itself, whatever was typed: copies, torch's names of number formats, and what is
# off without Megatron's own pipeline schedules.
SET_BY_VALIDATION = frozenset(
    {
        *("encoder_num_layers", "encoder_seq_length", "eval_global_batch_size", "eval_micro_batch_size"),
        *("expert_tensor_parallel_size", "tensor_parallel_num_weight_shards"),
        "expert_tensor_parallel_num_weight_shards",
        *("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
        *("megatron_fsdp_main_params_dtype", "megatron_fsdp_main_grads_dtype", "megatron_fsdp_grad_comm_dtype"),
        *("align_param_gather", "overlap_p2p_comm", "async_strategy"),
    }
)


def parse_and_validate_args(
    workload_of: Callable[[argparse.Namespace], Workload],
    extra_args_provider: AddArguments,
    defaults: Mapping[str, object],
) -> tuple[argparse.Namespace, Plan]:
    """Megatron's parsing and validation with the plan applied; sets Megatron's global variables.

    `defaults` replace the defaults of Megatron's arguments; what the user types wins over them. ConfigError for words
    that are wrong, and for values that would be ignored.
    """
    require_supported_megatron()
    take_rank_from_slurm()
    remember_docstrings()
    cpu.install()
    ours = {**(cpu.ARGUMENT_DEFAULTS if cpu.is_cpu() else {}), **UNDER_A_PLAN, **defaults}
    ours["mosaic_guard"] = guard.is_wanted()
    megatrons: list[argparse.ArgumentParser] = []

    def add_to_megatrons(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_mosaic_arguments(extra_args_provider(parser)).set_defaults(**ours)
        megatrons.append(parser)
        return parser

    typed = read_command_line(sys.argv[1:], extra_args_provider, ours).typed
    args = megatron_arguments.parse_args(add_to_megatrons)
    defaults = vars(megatrons[0].parse_known_args([])[0])
    # The values that Megatron's parser made, not the words: these are what counts.
    parsed = {dest: value for dest, value in vars(args).items() if dest in defaults and value != defaults[dest]}
    for dest, nothing in emptied_by(typed).items():
        setattr(args, dest, nothing)
    workload = workload_of(args)
    path = args.mosaic_plan or os.environ.get(PLAN_VARIABLE)
    plan = load_plan(path) if path else _data_parallel_plan(args, workload)
    validate_plan(plan, workload)
    apply_training(args, plan.training, parsed)
    decided = {**decided_by(plan, workload.backbone.name), **decide_arguments(plan.training)}
    for note in judge(CommandLine(typed=parsed, defaults=defaults), decided=decided, facts=facts_of(workload)):
        print_rank_0(f"> mosaic: {note}")
    apply_plan(args, plan, workload)
    set_global_variables(args)
    return args, plan


@cache
def prepare_ranks() -> None:
    """Do once what ranks that are forked later would each do: read Megatron's sources, look into all loaded modules."""
    remember_docstrings()
    megatron_arguments.add_megatron_arguments(argparse.ArgumentParser())
    guard.find_holders()


def apply_plan(args: argparse.Namespace, plan: Plan, workload: Workload) -> None:
    """Write the backbone's layout and the batch into Megatron's arguments, then let Megatron validate them.

    Megatron derives its data-parallel size from the world size; the backbone's is what counts samples, so validation
    sees the backbone's ranks as the world.
    """
    apply_backbone(args, plan, workload.backbone.name)


def apply_backbone(args: argparse.Namespace, plan: Plan, backbone: str) -> None:
    """`apply_plan` where no more than the backbone's name is known of the workload yet."""
    if plan.world_size != args.world_size:
        raise ConfigError(
            "WORLD_SIZE",
            got=args.world_size,
            expected=f"{plan.world_size}, the plan's world_size",
            fix=f"{describe_start(plan.world_size, os.environ)}, or plan for {args.world_size}",
        )
    layout = plan.modules[backbone].layout
    for dest, value in decided_by(plan, backbone).items():
        setattr(args, dest, value)
    setattr(args, APPLIED, True)
    if cpu.is_cpu():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    world_size, args.world_size = args.world_size, layout.num_ranks
    try:
        _validate(args)
    finally:
        args.world_size = world_size
    if args.data_parallel_size != layout.dp:
        raise ConfigError(
            "data-parallel size",
            got=f"{args.data_parallel_size}, as Megatron derives it from its arguments",
            expected=f"{layout.dp}, as in the plan",
            fix="leave out arguments that split the model: the plan decides",
        )


def _validate(args: argparse.Namespace) -> None:
    """Megatron's validation, its assertions as ConfigErrors; what it sets from other arguments is judged too."""
    before = dict(vars(args))
    try:
        megatron_arguments.validate_args(args, {})
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        asserted = traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(
            "Megatron's validation of the arguments",
            got=str(error) or f"not true: {asserted}",
            expected="arguments that fit together",
            fix="change one of them, or leave it out",
        ) from error
    changed = {
        row.dest: getattr(args, row.dest)
        for row in load_arguments()
        if row.verdict in (Verdict.refused, Verdict.plan)
        and row.dest not in SET_BY_VALIDATION
        and getattr(args, row.dest, before[row.dest]) != before[row.dest]
    }
    judge(CommandLine(typed=changed, defaults=before))


def _data_parallel_plan(args: argparse.Namespace, workload: Workload) -> Plan:
    """Without a plan file: every module on all ranks, data parallel."""
    micro_batch_size: Any = args.micro_batch_size or 1
    everywhere = ModulePlan(ranks=RankSet.of(range(args.world_size)), layout=Layout(dp=args.world_size))
    return Plan(
        workload=workload.name,
        world_size=args.world_size,
        global_batch_size=args.global_batch_size or micro_batch_size * args.world_size,
        micro_batch_size=micro_batch_size,
        schedule=ScheduleChoice("1f1b"),
        modules={module.name: everywhere for module in workload.modules},
    )
