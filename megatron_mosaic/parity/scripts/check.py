"""`mosaic check PLAN --script SCRIPT`: a Megatron script under a plan against itself on one process without one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parity.check import in_fp32, run_ranks
from megatron_mosaic.parity.verdict import Parity
from megatron_mosaic.plan.plan_file import load_plan, save_plan

# As in every check (parity.check): the first step of Adam is not to be the sign of a gradient. Dropout draws anew for
# every layout.
_DROPOUT = ("--hidden-dropout", "--attention-dropout")
_STEADY = (
    *(word for flag in _DROPOUT for word in (flag, "0")),
    *("--lr-decay-style", "constant", "--adam-eps", "1e-3", "--eval-iters", "0", "--eval-interval", "1000000"),
    *("--distributed-timeout-minutes", "2", "--log-interval", "1000"),
)
_DIVIDE_ONCE = "--calculate-per-token-loss"  # as the reference does; Megatron's default depends on the layout
_NO_NAN_CHECK = "--no-check-for-nan-in-loss-and-grad"  # a NaN is a finding of the check, not the end of it


def check_script(plan_path: str, script: str, *, steps: int = 3, megatron_args: Sequence[str] = ()) -> Parity:
    """Run the script under the plan, then alone, and compare."""
    plan = in_fp32(load_plan(plan_path))
    if not Path(script).is_file():
        raise ConfigError("--script", got=script, expected="a Megatron pretrain script", fix="correct the path")
    given = [word for word in megatron_args if word.partition("=")[0] in _DROPOUT]
    if given:
        raise ConfigError(
            given[0],
            got="set",
            expected="left out: a check is without dropout, which draws anew for every layout",
            fix=f"leave {given[0]} out of the check",
        )
    from megatron_mosaic.adapters import stock  # noqa: F401  forked ranks inherit it
    from megatron_mosaic.parallel_state_ext.rebound import cpu
    from megatron_mosaic.parity import compare
    from megatron_mosaic.runtime.arguments import prepare_ranks

    cpu.install()
    prepare_ranks()
    words = [*_STEADY, "--train-iters", str(steps), _NO_NAN_CHECK, *megatron_args]
    with tempfile.TemporaryDirectory(prefix="mosaic-check-") as directory:
        path = Path(directory) / "plan.yaml"
        save_plan(plan, path)
        if len(plan.modules) > 1:
            own = ["--mosaic-report", directory, "--mosaic-dump-gradients", directory, "--mosaic-measure-activations"]
            run_ranks(plan.world_size, directory, [], _under_plan, script, [*words, *own], str(path))
        else:
            run_ranks(plan.world_size, directory, [], _laid_out, script, [*words, _DIVIDE_ONCE], str(path), directory)
        run_ranks(1, directory, [], _alone, script, words, str(path), directory)
        return compare.compare(plan, steps, Path(directory))


def _under_plan(script: str, words: Sequence[str], plan_path: str) -> int:
    from megatron_mosaic.adapters.script import run_script

    run_script(script, words, load_plan(plan_path))
    return 0


def _laid_out(script: str, words: Sequence[str], plan_path: str, directory: str) -> int:
    from megatron_mosaic.parity.scripts import laid_out

    return laid_out.main(script, words, load_plan(plan_path), directory)


def _alone(script: str, words: Sequence[str], plan_path: str, directory: str) -> int:
    from megatron_mosaic.parity.scripts import alone

    return alone.main(script, words, load_plan(plan_path), directory)
