"""`--mosaic-plan` as an ordinary Megatron argument: parsing, and the plan written into Megatron's own arguments."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import megatron.training.arguments as megatron_arguments
from megatron.training.global_vars import set_global_variables

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound import cpu, guard
from megatron_mosaic.parallel_state_ext.rebound.rebind import require_supported_megatron
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.training_arguments import FLAGS, apply_training

PLAN_VARIABLE = "MOSAIC_PLAN"
APPLIED = "mosaic_plan_applied"  # set on the arguments once a plan is in them
_REFUSED = {  # Megatron arguments that this version does not carry over to several modules
    "overlap_param_gather": "--overlap-param-gather",
    "sequence_parallel": "--sequence-parallel",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "fp16": "--fp16",
    "num_experts": "--num-experts",
    "yaml_cfg": "--yaml-cfg",
    "async_save": "--async-save",
    "non_persistent_ckpt_type": "--non-persistent-ckpt-type",
    "virtual_pipeline_model_parallel_size": "virtual pipeline stages",
    "moe_z_loss_coeff": "--moe-z-loss-coeff",
    "moe_expert_capacity_factor": "--moe-expert-capacity-factor",
    "qk_layernorm": "--qk-layernorm",
    "log_params_norm": "--log-params-norm",
    "log_num_zeros_in_grad": "--log-num-zeros-in-grad",
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "save_wgrads_interval": "--save-wgrads-interval",
}

DECIDED_BY_PLAN = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "global_batch_size",
)


def add_mosaic_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The plugin's own arguments."""
    group = parser.add_argument_group("mosaic", "layouts and placement of modules")
    group.add_argument(
        "--mosaic-plan", metavar="FILE", help=f"plan file; default ${PLAN_VARIABLE}, else every module dp"
    )
    group.add_argument("--mosaic-schedule", metavar="FILE", help="text of the schedule of training steps")
    group.add_argument("--mosaic-report", metavar="DIR", help="write losses.jsonl and timeline.json here")
    group.add_argument(
        "--mosaic-dump-gradients", metavar="DIR", help="write every step's gradients here (parity checks)"
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
        default=guard.is_wanted(),
        help=f"raise where a module's code reads Megatron's global process groups; default ${guard.VARIABLE}",
    )
    group.add_argument("--mosaic-measure-activations", action="store_true", help="report saved activation bytes")
    return parser


def parse_and_validate_args(
    workload_of: Callable[[argparse.Namespace], Workload],
    extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    defaults: Mapping[str, object],
) -> tuple[argparse.Namespace, Plan]:
    """Megatron's parsing and validation with the plan applied; sets Megatron's global variables.

    `defaults` replace the defaults of Megatron's arguments; what the user types wins over them.
    """
    require_supported_megatron()
    cpu.install()
    untouched: dict[str, Any] = {}

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_mosaic_arguments(extra_args_provider(parser))
        parser.set_defaults(**(cpu.ARGUMENT_DEFAULTS if cpu.is_cpu() else {}), **defaults)
        untouched.update({key: parser.get_default(key) for key in (*DECIDED_BY_PLAN, *FLAGS)})
        return parser

    args = megatron_arguments.parse_args(add_arguments)
    typed = {key: getattr(args, key) for key, value in untouched.items() if getattr(args, key) != value}
    workload = workload_of(args)
    path = args.mosaic_plan or os.environ.get(PLAN_VARIABLE)
    plan = load_plan(path) if path else _data_parallel_plan(args, workload)
    apply_plan(args, plan, workload.backbone.name, typed)
    set_global_variables(args)
    return args, plan


def apply_plan(args: argparse.Namespace, plan: Plan, backbone: str, typed: Mapping[str, Any]) -> None:
    """Write the backbone's layout and the batch into Megatron's arguments, then let Megatron validate them.

    `typed` are the arguments among DECIDED_BY_PLAN and FLAGS that the user gave: they must agree with the plan.

    Megatron derives its data-parallel size from the world size; the backbone's is what counts samples, so validation
    sees the backbone's ranks as the world.
    """
    _refuse_unsupported(args)
    if plan.world_size != args.world_size:
        raise ConfigError(
            "WORLD_SIZE",
            got=args.world_size,
            expected=f"{plan.world_size}, the plan's world_size",
            fix=f"start {plan.world_size} processes, or plan for {args.world_size}",
        )
    layout = plan.modules[backbone].layout
    decided = (layout.tp, layout.cp, layout.pp, plan.micro_batch_size, plan.global_batch_size)
    for key, value in zip(DECIDED_BY_PLAN, decided, strict=True):
        if typed.get(key, value) != value:
            raise ConfigError(
                f"--{key.replace('_', '-')}",
                got=typed[key],
                expected=f"{value}, as in the plan",
                fix="leave the argument out: the plan decides",
            )
        setattr(args, key, value)
    apply_training(args, plan.training, typed)
    args.calculate_per_token_loss = True  # gradients are sums, divided once by the global token count
    args.dataloader_type = "external"
    setattr(args, APPLIED, True)
    if cpu.is_cpu():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    world_size, args.world_size = args.world_size, layout.num_ranks
    try:
        megatron_arguments.validate_args(args, {})
    finally:
        args.world_size = world_size
    _refuse_unsupported(args)  # validation sets some of them from others
    if args.data_parallel_size != layout.dp:
        raise ConfigError(
            "data-parallel size",
            got=f"{args.data_parallel_size}, as Megatron derives it from its arguments",
            expected=f"{layout.dp}, as in the plan",
            fix="leave out arguments that split the model: the plan decides",
        )


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


def _refuse_unsupported(args: argparse.Namespace) -> None:
    for key, flag in _REFUSED.items():
        if getattr(args, key, None):
            raise ConfigError(flag, got="set", expected="not set: not supported under a plan yet", fix=f"remove {flag}")


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
