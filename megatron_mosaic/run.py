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

from megatron_mosaic.adapters.stock import apply_to_stock_script as apply_to_stock_script
from megatron_mosaic.errors import ConfigError, MosaicError, RankFailure
from megatron_mosaic.flight.process import begin_early
from megatron_mosaic.launch.slurm.environment import take_rank_from_slurm
from megatron_mosaic.parallel_state_ext.rebound import checkpoint_io, cpu
from megatron_mosaic.parallel_state_ext.rebound.rebind import require_supported_megatron
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


def run_script(script: str, arguments: Sequence[str], plan: Plan) -> None:
    """The script under the plan, in this process."""
    if len(plan.modules) > 1:
        from megatron_mosaic.adapters.script import run_script as run
    else:
        from megatron_mosaic.adapters.stock import run_script as run
    run(script, arguments, plan)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
