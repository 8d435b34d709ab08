"""`torchrun ... -m megatron_mosaic.run SCRIPT.py MEGATRON-ARGS --mosaic-plan PLAN`: a pretrain script under a plan.

A script that brings a ModelDefinition (scripts/pretrain_any2any.py) gets the plan through $MOSAIC_PLAN and obeys all of
it. A stock script has one model. A plan with one module on all ranks becomes Megatron's own arguments; a plan with more
modules lays the model out where an adapter knows its class (`adapters/`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_mosaic.errors import ConfigError, MosaicError, RankFailure
from megatron_mosaic.flight.process import begin_early
from megatron_mosaic.launch.slurm.environment import take_rank_from_slurm
from megatron_mosaic.parallel_state_ext.rebound import checkpoint_io, cpu
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_uncaught, require_supported_megatron
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.runtime.arguments import PLAN_VARIABLE


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


def attach() -> None:
    """Called by a Megatron with patches/ before it parses a script's arguments: run it under their --mosaic-plan.

    What is wrong with plan or arguments ends the process with exit status 2, as `main` does.
    """
    rebind_uncaught(_end_with_message)
    take_rank_from_slurm()
    begin_early()
    require_supported_megatron()
    cpu.install()
    checkpoint_io.install()
    plan_path, sys.argv[1:] = _take_plan(sys.argv[1:])
    plan = load_plan(plan_path)
    os.environ[PLAN_VARIABLE] = str(plan_path)
    if len(plan.modules) > 1:
        from megatron_mosaic.adapters.script import attach as attach_to
    else:
        from megatron_mosaic.adapters.stock import attach as attach_to
    attach_to(plan)


def _end_with_message(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What becomes of an exception that nobody has caught."""
    if isinstance(error, RankFailure) or not isinstance(error, MosaicError):
        sys.__excepthook__(kind, error, trace)
        return
    print(error, file=sys.__stderr__)  # torch.distributed collects what its hook's hook writes, and would lose it
    raise SystemExit(2)


def run_script(script: str, arguments: Sequence[str], plan: Plan) -> None:
    """The script under the plan, in this process."""
    if len(plan.modules) > 1:
        from megatron_mosaic.adapters.script import run_script as run
    else:
        from megatron_mosaic.adapters.stock import run_script as run
    run(script, arguments, plan)


def _split_command_line(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """(script, plan file, the script's arguments)."""
    plan_path, rest = _take_plan(words)
    if not rest or not Path(rest[0]).is_file():
        raise ConfigError(
            "megatron_mosaic.run",
            got=rest[0] if rest else "no script",
            expected="SCRIPT.py MEGATRON-ARGS --mosaic-plan PLAN",
            fix="give the path of a Megatron pretrain script first",
        )
    return rest[0], plan_path, rest[1:]


def _take_plan(words: Sequence[str]) -> tuple[str, list[str]]:
    """(plan file, the other words)."""
    parser = argparse.ArgumentParser(prog="megatron_mosaic.run", add_help=False, allow_abbrev=False)
    parser.add_argument("--mosaic-plan", default=os.environ.get(PLAN_VARIABLE))
    known, rest = parser.parse_known_args(list(words))
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
    return known.mosaic_plan, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
