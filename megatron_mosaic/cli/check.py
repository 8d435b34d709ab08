"""`mosaic check`: parity of a plan with a single process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_mosaic.cli.imports import import_runtime
from megatron_mosaic.cli.output import print_json, print_note, print_progress, print_table
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parity.verdict import FORMAT, TOLERANCE, Parity
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.units import format_bytes

MODELS = ("any2any-digits",)


def main(arguments: argparse.Namespace) -> int:
    """0 if losses and all gradients agree, else 1."""
    plan = load_plan(arguments.plan)
    if arguments.steps < 1:
        raise ConfigError("--steps", got=arguments.steps, expected="at least 1", fix="leave it out")
    if arguments.script:
        return _check_script(arguments, plan)
    megatron_args = [*arguments.megatron_args, *_workload_args(arguments, plan)]
    from megatron_mosaic.parity.check import check_plan, require_checkable

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for note in require_checkable(plan, megatron_args, arguments.mosaic_schedule, steps=arguments.steps):
        print_note(note)
    import_runtime()
    print_progress(f"check: {plan.world_size} ranks, then a single process, {arguments.steps} steps ...")
    parity = check_plan(
        arguments.plan, steps=arguments.steps, megatron_args=megatron_args, schedule=arguments.mosaic_schedule
    )
    if arguments.json:
        print_json(parity.as_dict())
    else:
        _print_parity(parity, plan)
    return 0 if parity.ok else 1


def _check_script(arguments: argparse.Namespace, plan: Plan) -> int:
    """A Megatron script under the plan against itself on one process without one."""
    if arguments.model or arguments.mosaic_schedule:
        given = "--model" if arguments.model else "--mosaic-schedule"
        raise ConfigError(given, got="with --script", expected="the script's own model", fix=f"leave {given} out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import_runtime()
    from megatron_mosaic.parity.scripts.check import check_script

    print_progress(f"check: {plan.world_size} ranks, then a single process, {arguments.steps} steps ...")
    parity = check_script(
        arguments.plan, arguments.script, steps=arguments.steps, megatron_args=arguments.megatron_args
    )
    if arguments.json:
        print_json(parity.as_dict())
    else:
        _print_parity(parity, plan)
    return 0 if parity.ok else 1


def _print_parity(parity: Parity, plan: Plan) -> None:
    verdict = "the same" if parity.ok else "NOT the same" if not parity.is_same else "NOT known to be the same"
    if plan.training and plan.training.format is not FORMAT:
        print(f"computed in {FORMAT}, as every check is; the plan trains in {plan.training.format}")
    print_table(
        f"{verdict} as one process (tolerance {TOLERANCE:g}, {FORMAT}): losses of {parity.steps} steps differ by "
        f"{parity.loss_rel_err:.1e}, gradients by {parity.grad_rel_err_max:.1e}, parameters after the last step by "
        f"{parity.parameter_rel_err_max:.1e}",
        (
            "module",
            "largest gradient error",
            "parameter error",
            "peak activations of a rank",
            "units without items",
            "imbalance (by owner)",
        ),
        [
            (
                name,
                f"{parity.grad_rel_err_by_module[name]:.1e}",
                f"{parity.parameter_rel_err_by_module[name]:.1e}",
                *_measures(parity, name),
            )
            for name in plan.modules
        ],
    )
    for sentence in parity.sentences:
        print(sentence)


def _measures(parity: Parity, name: str) -> tuple[str, str, str]:
    """Peak activations, units without items, imbalance of a module; nobody measures where Megatron lays it out."""
    if name not in parity.peak_activation_bytes_by_module:
        return ("not measured",) * 3
    return (
        format_bytes(parity.peak_activation_bytes_by_module[name]),
        str(parity.empty_units_by_module[name]),
        f"{parity.imbalance_by_module[name]:.2f} ({parity.imbalance_by_owner[name]:.2f})",
    )


def _workload_args(arguments: argparse.Namespace, plan: Plan) -> list[str]:
    """Arguments that choose the model: the digits, or made-up data for a model file."""
    model = arguments.model or (MODELS[0] if "--workload" in arguments.megatron_args else plan.workload)
    if model in MODELS:
        return []
    if not Path(model).is_file():
        raise ConfigError(
            "--model",
            got=model,
            expected=f"one of {list(MODELS)}, or a model file like those in conf/model",
            fix="use a model that can be run here",
        )
    return ["--workload", model]
