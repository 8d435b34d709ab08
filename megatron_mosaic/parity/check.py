"""`mosaic check`: does this plan compute what one process computes?

The plan runs through Megatron's `pretrain()` on local CPU processes; the reference runs in one. Same weights, same
batches; every step's losses and every parameter's gradient are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mosaic.any2any.arguments import judge_words, read_words, refuse_given
from megatron_mosaic.errors import ConfigError, PlanError, RankFailure
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parity.verdict import FORMAT, TOLERANCE, Parity
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.validate import list_empty_replicas
from megatron_mosaic.runtime.flags.judge import Purpose
from megatron_mosaic.schedules.plan_match import load_training_schedule

# No warm-up and no decay unless asked for. A large eps, because Adam's first step is otherwise the *sign* of the
# gradient: where that is zero but for rounding, two correct runs would step in opposite directions.
# Small models on local processes: who waits for minutes waits for nothing.
_STEADY = {
    "distributed_timeout_minutes": 2,
    "lr_decay_style": "constant",
    "lr_warmup_fraction": 0.0,
    "adam_eps": 1e-3,
    "eval_iters": 0,
}
_GIVEN = ("mosaic_plan", "mosaic_report", "mosaic_dump_gradients", "mosaic_measure_activations")  # by the check itself


def check_plan(
    plan_path: str, *, steps: int = 3, megatron_args: Sequence[str] = (), schedule: str | None = None
) -> Parity:
    """Run plan and reference and compare them. RankFailure if a rank fails; PlanError if the plan cannot run.

    `schedule`: a file with the order of training steps; the reference has none.
    """
    plan = in_fp32(load_plan(plan_path))
    require_checkable(plan, megatron_args, schedule, steps=steps)
    from megatron_mosaic.any2any import pretrain  # heavy: only once the plan is known to be sound
    from megatron_mosaic.parallel_state_ext.rebound import cpu
    from megatron_mosaic.parity import compare, reference_run
    from megatron_mosaic.runtime import train  # noqa: F401  forked ranks inherit it
    from megatron_mosaic.runtime.arguments import PLAN_VARIABLE, prepare_ranks

    cpu.install()
    prepare_ranks()
    with contextlib.suppress(ImportError):  # the ranks say what is missing
        import sklearn.datasets  # noqa: F401  seconds to import; forked ranks inherit it
    with tempfile.TemporaryDirectory(prefix="mosaic-check-") as directory:
        ours = words_of_ranks(plan, steps, megatron_args, directory)
        ours += ["--mosaic-schedule", schedule] if schedule else []
        run_ranks(plan.world_size, directory, ours, pretrain.train)
        reference = words_of_reference(plan, steps, megatron_args)
        for measure_rounding in (False, True):  # takes six times as long, and few checks need it
            run_ranks(1, directory, reference, reference_run.main, directory, measure_rounding, env={PLAN_VARIABLE: ""})
            parity = compare.compare(plan, steps, Path(directory))
            if parity.grad_rel_err_max <= TOLERANCE:
                break
        return parity


def words_of_ranks(plan: Plan, steps: int, megatron_args: Sequence[str], directory: str) -> list[str]:
    """The command line of the plan's ranks, which leave all that is compared in the directory; so is the plan."""
    path = Path(directory) / "plan.yaml"
    save_plan(plan, path)
    words = [*_steady_words(megatron_args, steps), *megatron_args, "--mosaic-plan", str(path)]
    words += ["--mosaic-report", directory, "--mosaic-dump-gradients", directory, "--mosaic-measure-activations"]
    return [*words, "--no-check-for-nan-in-loss-and-grad"]  # a NaN is a finding of the check, not the end of it


def words_of_reference(plan: Plan, steps: int, megatron_args: Sequence[str]) -> list[str]:
    """The command line of the single process."""
    words = [*_steady_words(megatron_args, steps), *megatron_args]
    return [*words, "--global-batch-size", str(plan.global_batch_size), "--micro-batch-size", "1"]


def in_fp32(plan: Plan) -> Plan:
    """The plan as it is checked."""
    return replace(plan, training=replace(plan.training, format=FORMAT)) if plan.training else plan


def require_checkable(
    plan: Plan, megatron_args: Sequence[str] = (), schedule: str | None = None, *, steps: int = 3
) -> tuple[str, ...]:
    """Sentences on arguments without effect. PlanError or ConfigError unless the reference model with these arguments
    can run under the plan (in the order of the file) and has an oracle. Needs no torch."""
    line = read_words(megatron_args, {**_STEADY, "train_iters": steps})
    refuse_given(line.typed, _GIVEN, "mosaic check")
    workload, notes = judge_words(line, in_fp32(plan), Purpose.check)
    load_training_schedule(plan, workload, schedule)  # refuses what cannot be ordered
    return (*notes, *list_empty_replicas(plan, workload))


def _steady_words(megatron_args: Sequence[str], steps: int) -> list[str]:
    """What a check sets, as words; without the defaults that give way to what is typed."""
    values = vars(read_words(megatron_args, _STEADY).values)
    ours = {dest: value for dest, value in _STEADY.items() if values[dest] == value}
    words = [(f"--{dest.replace('_', '-')}", str(value)) for dest, value in ours.items()]
    return [word for pair in (*words, ("--train-iters", str(steps)), ("--log-interval", "1000")) for word in pair]


def run_ranks(
    world_size: int,
    directory: str,
    words: Sequence[str],
    main: Callable[..., int],
    *args: object,
    env: Mapping[str, str] | None = None,
) -> None:
    """`main(*args)` of a script on every forked rank. What a rank refuses is refused here; RankFailure if one fails."""
    try:
        run_forked(world_size, with_command_line, words, _keeping_refusal, directory, main, *args, env=env)
    except RankFailure:
        refusals = sorted(Path(directory).glob("refusal-*.json"))
        if not refusals:
            raise
        refusal = json.loads(refusals[0].read_text())
        raise ConfigError(**{part: refusal[part] for part in ("where", "got", "expected", "fix")}) from None


def _keeping_refusal(directory: str, main: Callable[..., int], *args: object) -> int:
    """On a rank: `main(*args)`; what is wrong with the input is left in a file."""
    try:
        return main(*args)
    except (ConfigError, PlanError) as error:
        (Path(directory) / f"refusal-{os.environ['RANK']}.json").write_text(json.dumps(error.as_dict()))
        return 2
