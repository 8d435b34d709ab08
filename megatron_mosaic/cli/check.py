"""`mosaic check`: parity of a plan with a single process."""

from __future__ import annotations

import argparse
import os

from megatron_mosaic.cli.output import print_json, print_progress, print_table
from megatron_mosaic.cli.runtime import import_runtime
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan_file import load_plan
from megatron_mosaic.units import format_bytes

MODELS = ("any2any-digits",)


def main(arguments: argparse.Namespace) -> int:
    """0 if losses and all gradients agree, else 1."""
    plan = load_plan(arguments.plan)
    model = arguments.model or plan.workload
    if model not in MODELS:
        raise ConfigError(
            "--model", got=model, expected=f"one of {list(MODELS)}", fix="use a model that can be run here"
        )
    if arguments.steps < 1:
        raise ConfigError("--steps", got=arguments.steps, expected="at least 1", fix="leave it out")
    from megatron_mosaic.check import TOLERANCE, check_plan, require_checkable

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    require_checkable(plan, arguments.megatron_args)
    import_runtime()
    print_progress(f"check: {plan.world_size} ranks, then a single process, {arguments.steps} steps ...")
    parity = check_plan(arguments.plan, steps=arguments.steps, megatron_args=arguments.megatron_args)
    if arguments.json:
        print_json(parity.as_dict())
    else:
        verdict = "the same" if parity.ok else "NOT the same"
        print_table(
            f"{verdict} as one process (tolerance {TOLERANCE:g}, fp32): losses of {parity.steps} steps differ by "
            f"{parity.loss_rel_err:.1e}, gradients by {parity.grad_rel_err_max:.1e}",
            ("module", "largest gradient error", "peak activations of a rank", "units without items"),
            [
                (
                    name,
                    f"{parity.grad_rel_err_by_module[name]:.1e}",
                    format_bytes(parity.peak_activation_bytes_by_module[name]),
                    str(parity.empty_units_by_module[name]),
                )
                for name in plan.modules
            ],
        )
        if not parity.ok:
            print(f"worst: {parity.worst_parameter}")
    return 0 if parity.ok else 1
