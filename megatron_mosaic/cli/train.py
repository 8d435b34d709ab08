"""`mosaic train`: the reference model under a plan, through Megatron's own pretrain(), beside what was predicted."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_mosaic.any2any.arguments import add_any2any_arguments, judge_words, read_words, refuse_given
from megatron_mosaic.cli.output import print_json, print_note, print_progress, print_table, write_text
from megatron_mosaic.cli.planned import apply_overrides, print_notes
from megatron_mosaic.cli.predicted import build_prediction, list_unpriced
from megatron_mosaic.cost_model.hardware.profile import default_profile_path
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.errors import ConfigError, MosaicError, ProfileError
from megatron_mosaic.launch.torchrun import run_torchrun
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.report_page.measured_run import LOSSES_FILE, TIMELINE_FILE, read_losses, timeline_of
from megatron_mosaic.runtime.flags.command_line import CommandLine
from megatron_mosaic.runtime.flags.judge import Purpose
from megatron_mosaic.runtime.flags.words import flags_of, refuse_twice, split_words
from megatron_mosaic.runtime.telemetry.prediction import PREDICTED_FILE, Prediction, format_prediction
from megatron_mosaic.runtime.telemetry.timelines import remove_timelines
from megatron_mosaic.schedules import Schedule
from megatron_mosaic.schedules.plan_match import load_training_schedule
from megatron_mosaic.schedules.timeline import Timeline, diff, diff_kinds
from megatron_mosaic.schedules.views.text import render_text
from megatron_mosaic.schedules.views.trace import TracedStep, to_chrome_trace
from megatron_mosaic.units import MS, format_seconds

SCRIPT = "megatron_mosaic.any2any.pretrain"
_GIVEN = ("mosaic_plan", "mosaic_report", "mosaic_predicted")  # to the ranks, by this command
TRAINED_LOSS = "loss"  # the objective: all losses, weighted, over all loss tokens


def main(arguments: argparse.Namespace) -> int:
    """Launch torchrun, then print losses, the measured timeline and, with a profile, the predicted one."""
    plan = load_plan(arguments.plan)
    flags = _flags(arguments.megatron_args)
    line = read_words(flags)
    refuse_given(line.typed, _GIVEN, "mosaic train")
    workload, notes = judge_words(line, plan, Purpose.train)
    _validate_length(line)
    schedule = load_training_schedule(plan, workload, arguments.mosaic_schedule)  # refuses what cannot be ordered
    for note in notes:
        print_note(note)
    predicted = _predict(plan, workload, arguments.profile, schedule) if _is_priced(line) else None
    with _report_directory(arguments.report) as directory:
        if "load" not in line.typed:
            remove_timelines(Path(directory))
        words = ["-m", SCRIPT, "--mosaic-plan", arguments.plan, "--mosaic-report", directory]
        if predicted is not None:
            write_text(str(Path(directory) / PREDICTED_FILE), format_prediction(predicted.told))
            words += ["--mosaic-predicted", str(Path(directory) / PREDICTED_FILE)]
        if arguments.mosaic_schedule:
            words += ["--mosaic-schedule", arguments.mosaic_schedule]
        with _output(arguments) as output:
            progress = _Progress(Path(directory) / LOSSES_FILE)
            run_torchrun(plan.world_size, [*words, *flags], output=output, watch=progress.show)
        losses, measured = _read_report(Path(directory))
    timeline, expected = timeline_of(measured), predicted.timeline if predicted else None
    if arguments.trace:
        both = {"predicted": expected, "measured": timeline}
        steps = [TracedStep(title=title, timeline=each) for title, each in both.items() if each]
        write_text(arguments.trace, to_chrome_trace(steps, schedule))
    if arguments.json:
        print_json(_result(losses, measured, timeline, expected))
        return 0
    print()
    print(render_losses(losses))
    print()
    print_timelines(timeline, expected)
    return 0


def _flags(words: Sequence[str]) -> list[str]:
    """Megatron's flags, those written as Hydra words (`train.lr=3e-4`) first."""
    values, rest = split_words(words)
    refuse_twice(values, read_words(rest).typed)
    return [*flags_of(values, add_any2any_arguments), *rest]


def _report_directory(kept: str | None) -> contextlib.AbstractContextManager[str]:
    """Where rank 0 writes what it measured: the directory to keep, or one that goes afterwards."""
    if kept is None:
        return tempfile.TemporaryDirectory(prefix="mosaic-train-")
    try:
        Path(kept).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--report {kept}", got=str(error), expected="a directory", fix="name one that can be made"
        ) from error
    return contextlib.nullcontext(kept)


def _output(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[IO[str] | None]:
    """Where the workers print: the log file, or stderr when stdout is for the JSON object."""
    if not arguments.log:
        return contextlib.nullcontext(sys.stderr if arguments.json else None)
    try:
        return open(arguments.log, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            arguments.log, got=str(error), expected="a writable path", fix="create the directory"
        ) from error


class _Progress:
    """Says on a terminal how far training is. `_shown` steps were told already."""

    def __init__(self, losses: Path) -> None:
        self._losses, self._shown = losses, 0

    def show(self) -> None:
        steps = read_losses(self._losses) if self._losses.exists() else []
        if len(steps) > self._shown:
            self._shown = len(steps)
            print_progress(f"train: step {self._shown}, loss {steps[-1][TRAINED_LOSS]:.4f}")


def _read_report(directory: Path) -> tuple[tuple[dict[str, float], ...], dict[str, Any]]:
    """Losses and the measured timeline. ConfigError without a step: a checkpoint may already be at --train-iters."""
    timeline = directory / TIMELINE_FILE
    if not timeline.exists():
        raise ConfigError(
            "mosaic train", got="no training step", expected="at least one", fix="raise --train-iters, or check --load"
        )
    return read_losses(directory / LOSSES_FILE), json.loads(timeline.read_text())


def _validate_length(line: CommandLine) -> None:
    """ConfigError if these arguments train nothing."""
    for dest in ("train_iters", "train_samples"):
        value = line.typed.get(dest, 1)
        if value < 1:
            flag = f"--{dest.replace('_', '-')}"
            raise ConfigError(flag, got=value, expected="at least 1: nothing would be trained", fix="raise it")


def _is_priced(line: CommandLine) -> bool:
    """Whether the cost model knows the layers."""
    unpriced = list_unpriced(line)
    if unpriced:
        print_note(f"no prediction: the cost model knows nothing of {', '.join(unpriced)}")
    return not unpriced


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A prediction: its timeline, and what the ranks are told of it."""

    timeline: Timeline
    told: Prediction


def _predict(plan: Plan, workload: Workload, profile: str | None, schedule: Schedule) -> Expected | None:
    """The prediction, if this machine has a profile of this model (or one is named: then it must be one)."""
    if profile is None and not default_profile_path().exists():
        return None
    try:
        planned = apply_overrides(plan, [] if _is_local(plan) else _here(plan))
        task = planned.build_task(profile)
        if _is_local(plan):
            print_notes(planned, task.profile.title if task.profile else "")
        if task.workload.digest != workload.digest:
            raise ProfileError(
                "prediction",
                got=f"model arguments of digest {workload.digest}",
                expected=f"the sizes of model={plan.workload}, digest {task.workload.digest}",
                fix="leave out the model arguments, or --profile",
            )
        simulation = simulate(plan, task.cost_model(), schedule)
        return Expected(timeline=simulation.timeline(), told=build_prediction(plan, task, simulation))
    except MosaicError as error:
        if profile is not None:
            raise
        print_note(f"no prediction: {error.where}: got {error.got}, expected {error.expected}")
        return None


def _is_local(plan: Plan) -> bool:
    return plan.cluster == "local" or (isinstance(plan.cluster, Mapping) and plan.cluster.get("kind") == "local")


def _here(plan: Plan) -> list[str]:
    """Overrides for this machine: what runs here is predicted, wherever the plan is for."""
    return ["cluster=local", f"cluster.num_ranks={plan.world_size}"]


def _result(
    losses: Sequence[dict[str, float]], measured: dict[str, Any], timeline: Timeline, predicted: Timeline | None
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "losses": [step[TRAINED_LOSS] for step in losses],
        "losses_by_name": {name: [step[name] for step in losses] for name in losses[0]},
        "step_s": measured["step_s"],
        "measured": {
            "step_s": measured["step_s"],
            "bubble_frac": timeline.bubble_frac,
            "by_module": timeline.seconds_by_module(),
            "seconds": measured["seconds"],
        },
    }
    if predicted is not None:
        result["predicted"] = {
            "step_s": predicted.end_s,
            "bubble_frac": predicted.bubble_frac,
            "by_module": predicted.seconds_by_module(),
        }
        result["error_frac"] = predicted.end_s / timeline.end_s - 1
        result["residual_by_kind"] = {
            each.kind: {
                "predicted_s": each.predicted_s,
                "measured_s": each.measured_s,
                "residual_s": each.residual_s,
            }
            for each in diff_kinds(predicted, timeline)
        }
    return result


def render_losses(losses: Sequence[dict[str, float]], *, rows: int = 10, width: int = 50) -> str:
    """The loss curve as text: one row per tenth of the run (its mean), a bar for the trained loss."""
    names = list(losses[0])
    size = max(1, len(losses) // rows)
    blocks = [losses[i : i + size] for i in range(0, len(losses), size)]
    means = [{name: sum(step[name] for step in block) / len(block) for name in names} for block in blocks]
    top = max((mean[TRAINED_LOSS] for mean in means if math.isfinite(mean[TRAINED_LOSS])), default=0.0)
    lines = ["steps     " + "".join(f"{name:>16}" for name in names)]
    for index, mean in enumerate(means):
        first = index * size + 1
        last = first + len(blocks[index]) - 1
        loss = mean[TRAINED_LOSS]
        bar = "#" * round(width * loss / top) if top > 0 and math.isfinite(loss) else ""
        lines.append(f"{first:>4}-{last:<5}" + "".join(f"{mean[name]:>16.4f}" for name in names) + f"  {bar}")
    return "\n".join(lines)


def print_timelines(measured: Timeline, predicted: Timeline | None) -> None:
    """Predicted above measured, on one time scale, then lane by lane."""
    if predicted is None:
        print(f"measured: median step {format_seconds(measured.end_s)}")
        print(render_text(measured))
        print("(no prediction: `mosaic calibrate` measures this machine for one)")
        return
    end_s = max(measured.end_s, predicted.end_s)
    print(f"predicted: step {format_seconds(predicted.end_s)}")
    print(render_text(predicted, end_s=end_s))
    print()
    print(f"measured: median step {format_seconds(measured.end_s)}")
    print(render_text(measured, end_s=end_s))
    print()
    print_table(
        f"prediction error of the step: {predicted.end_s / measured.end_s - 1:+.0%}",
        ("lane (mean over its ranks)", "predicted ms", "measured ms"),
        [(d.lane, f"{d.predicted_s / MS:.1f}", f"{d.measured_s / MS:.1f}") for d in diff(predicted, measured)],
    )
    print_table(
        "where it is lost: what a rank does in a step, on average",
        ("kind of action", "predicted ms", "measured ms", "residual ms"),
        [
            (d.kind, f"{d.predicted_s / MS:.1f}", f"{d.measured_s / MS:.1f}", f"{d.residual_s / MS:+.1f}")
            for d in diff_kinds(predicted, measured)
        ],
    )
