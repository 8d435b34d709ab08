"""`mosaic check`: does this plan compute what one process computes?

The plan runs through Megatron's `pretrain()` on local CPU processes; the reference runs in one. Same weights, same
batches; every step's losses and every parameter's gradient are compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_mosaic.any2any.arguments import judge_words, read_words, refuse_given
from megatron_mosaic.errors import ConfigError, PlanError, RankFailure
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.training import Format
from megatron_mosaic.runtime.flags.judge import Purpose
from megatron_mosaic.schedules.plan_match import load_training_schedule

FORMAT = Format.fp32  # whatever the plan trains in: rounding has to stay far below mistakes
TOLERANCE = 1e-5  # relative
# Where a gradient is a sum of terms that nearly cancel, fp32 itself leaves more than TOLERANCE open: the gradient of a
# top-1 router that saw one image may be 1e-5 of what was summed. Then it has to agree within so many times what it
# moves when the last bit of every weight does (ReferenceStep.rounding).
_ROUNDINGS = 20
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Outcome of a check. Errors are relative; a gradient's is |ours - reference| / |reference|, in the 2-norm.

    `ill_conditioned`: errors of gradients that fp32 does not determine to TOLERANCE, and that are the same but for
    rounding. The other figures leave them out.
    """

    steps: int
    loss_rel_err: float
    grad_rel_err_by_module: dict[str, float]
    worst_parameter: str
    ill_conditioned: dict[str, float]  # by "module/parameter in step N"
    peak_activation_bytes_by_module: dict[str, int]
    empty_units_by_module: dict[str, int]
    imbalance_by_owner: dict[str, float]  # busiest lane over mean, were items computed where their sample is
    imbalance_by_module: dict[str, float]  # and as they are

    @property
    def grad_rel_err_max(self) -> float:
        return max(self.grad_rel_err_by_module.values())

    @property
    def ok(self) -> bool:
        return self.loss_rel_err <= TOLERANCE and self.grad_rel_err_max <= TOLERANCE

    def as_dict(self) -> dict[str, object]:
        """Keys of `mosaic check --json`."""
        return {
            "ok": self.ok,
            "format": FORMAT.value,
            "loss_rel_err": self.loss_rel_err,
            "grad_rel_err_max": self.grad_rel_err_max,
            "grad_rel_err_by_module": self.grad_rel_err_by_module,
            "worst_parameter": self.worst_parameter,
            "ill_conditioned": self.ill_conditioned,
            "peak_activation_bytes_by_module": self.peak_activation_bytes_by_module,
            "empty_units_by_module": self.empty_units_by_module,
            "imbalance_by_owner": self.imbalance_by_owner,
            "imbalance_by_module": self.imbalance_by_module,
            "steps": self.steps,
            "tolerance": TOLERANCE,
        }


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
    from megatron_mosaic.parity import reference_run
    from megatron_mosaic.runtime import train  # noqa: F401
    from megatron_mosaic.runtime.arguments import PLAN_VARIABLE, prepare_ranks

    cpu.install()
    prepare_ranks()
    with contextlib.suppress(ImportError):  # the ranks say what is missing
        import sklearn.datasets  # noqa: F401  seconds to import; forked ranks inherit it
    arguments = [*_steady_words(megatron_args, steps), *megatron_args]
    with tempfile.TemporaryDirectory(prefix="mosaic-check-") as directory:
        checked = Path(directory) / "plan.yaml"
        save_plan(plan, checked)
        ours = [*arguments, "--mosaic-plan", str(checked), "--mosaic-report", directory]
        ours += ["--mosaic-dump-gradients", directory, "--mosaic-measure-activations"]
        ours += ["--no-check-for-nan-in-loss-and-grad"]  # a NaN is a finding of the check, not the end of it
        ours += ["--mosaic-schedule", schedule] if schedule else []
        _run(plan.world_size, directory, ours, pretrain.train)
        reference = [*arguments, "--global-batch-size", str(plan.global_batch_size), "--micro-batch-size", "1"]
        for measure_rounding in (False, True):  # takes six times as long, and few checks need it
            _run(1, directory, reference, reference_run.main, directory, measure_rounding, env={PLAN_VARIABLE: ""})
            parity = _compare(plan, steps, Path(directory))
            if parity.grad_rel_err_max <= TOLERANCE:
                break
        return parity


def in_fp32(plan: Plan) -> Plan:
    """The plan as it is checked."""
    return replace(plan, training=replace(plan.training, format=FORMAT)) if plan.training else plan


def require_checkable(
    plan: Plan, megatron_args: Sequence[str] = (), schedule: str | None = None, *, steps: int = 3
) -> tuple[str, ...]:
    """Sentences on arguments without effect. PlanError or ConfigError unless the reference model with these arguments
    can run under the plan (in the order of the file) and has an oracle. Needs no torch."""
    line = read_words(megatron_args, {**_STEADY, "train_iters": steps})
    refuse_given(line, _GIVEN, "mosaic check")
    workload, notes = judge_words(line, in_fp32(plan), Purpose.check)
    load_training_schedule(plan, workload, schedule)  # refuses what cannot be ordered
    return notes


def _steady_words(megatron_args: Sequence[str], steps: int) -> list[str]:
    """What a check sets, as words; without the defaults that give way to what is typed."""
    values = vars(read_words(megatron_args, _STEADY).values)
    ours = {dest: value for dest, value in _STEADY.items() if values[dest] == value}
    words = [(f"--{dest.replace('_', '-')}", str(value)) for dest, value in ours.items()]
    return [word for pair in (*words, ("--train-iters", str(steps)), ("--log-interval", "1000")) for word in pair]


def _run(
    world_size: int,
    directory: str,
    words: Sequence[str],
    main: Callable[..., int],
    *args: object,
    env: Mapping[str, str] | None = None,
) -> None:
    """`main(*args)` of a script on every rank. What a rank refuses is refused here; RankFailure if one fails."""
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


def _compare(plan: Plan, steps: int, directory: Path) -> Parity:
    from megatron_mosaic.parity.reference import ReferenceStep
    from megatron_mosaic.runtime.report import LOSSES_FILE, MEASURES_FILE, read_gradients

    losses = [json.loads(line) for line in (directory / LOSSES_FILE).read_text().splitlines()]
    if len(losses) != steps:
        raise ConfigError("check", got=f"{len(losses)} steps", expected=f"{steps} steps", fix="report this")
    loss_error, worst = 0.0, ("", 0.0)
    by_module, ill_conditioned = dict.fromkeys(plan.modules, 0.0), {}
    for step in range(steps):
        expected, ours = ReferenceStep.load(directory, step), read_gradients(directory, step)
        for name, value in expected.losses.items():
            loss_error = max(loss_error, _ratio(abs(losses[step][name] - value), abs(value)))
        if expected.gradients.keys() != ours.keys():
            differing = sorted(expected.gradients.keys() ^ ours.keys())
            some = f"{len(differing)} parameters on one side only, e.g. {differing[0]}"
            raise ConfigError("check", got=some, expected="the reference's parameters", fix="report this")
        for name, gradient in expected.gradients.items():
            relative, is_rounding = gradient_error(ours[name], gradient, expected.rounding.get(name, 0.0))
            if is_rounding:
                ill_conditioned[f"{name} in step {step}"] = relative
                continue
            module = name.partition("/")[0]
            by_module[module] = max(by_module[module], relative)
            worst = max(worst, (f"{name} in step {step}", relative), key=lambda pair: pair[1])
    measures = json.loads((directory / MEASURES_FILE).read_text())
    return Parity(
        steps=steps,
        loss_rel_err=loss_error,
        grad_rel_err_by_module=by_module,
        worst_parameter=worst[0],
        ill_conditioned=ill_conditioned,
        peak_activation_bytes_by_module=measures["peak_activation_bytes_by_module"],
        empty_units_by_module=measures["empty_units_by_module"],
        imbalance_by_owner=measures["imbalance_by_owner"],
        imbalance_by_module=measures["imbalance_by_module"],
    )


def gradient_error(ours: np.ndarray, expected: np.ndarray, rounding: float) -> tuple[float, bool]:
    """(relative error in the 2-norm, whether it is above TOLERANCE and yet only rounding); inf for NaN."""
    error = float(np.linalg.norm((ours - expected).astype(np.float64)))
    relative = _ratio(error, float(np.linalg.norm(expected.astype(np.float64))))
    is_rounding = relative > TOLERANCE and math.isfinite(rounding) and error <= _ROUNDINGS * rounding
    return relative, is_rounding


def _ratio(error: float, size: float) -> float:
    """error / size. NaN is infinity: `max` would otherwise lose it. 0 / 0 is no error."""
    ratio = error / size if size else (math.inf if error else 0.0)
    return ratio if math.isfinite(ratio) else math.inf
