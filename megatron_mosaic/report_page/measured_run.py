"""What a run left in its report directory: losses, and the timeline of its median step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import RankSet
from megatron_mosaic.schedules.timeline import Span, Timeline, diff

LOSSES_FILE, TIMELINE_FILE = "losses.jsonl", "timeline.json"
MAX_LOSSES = 1000  # points of a curve


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run's numbers. `steps_s`: of the last steps; `timeline`: of their median; `losses`: a mapping a step."""

    losses: tuple[Mapping[str, float], ...]
    timeline: Timeline
    steps_s: tuple[float, ...]


def load_run(directory: Path) -> MeasuredRun:
    """The run of a report directory, or of a run directory that has one. ConfigError where there is none."""
    found = directory / "report" if (directory / "report" / TIMELINE_FILE).exists() else directory
    if not (found / TIMELINE_FILE).exists():
        raise ConfigError(
            f"--run {directory}",
            got=f"no {TIMELINE_FILE}" if directory.is_dir() else "no such directory",
            expected="what `mosaic train --report DIR`, `--mosaic-report DIR` or a job of `mosaic submit` left",
            fix="train at least one step to the end",
        )
    data = _read_json(found / TIMELINE_FILE)
    try:
        timeline = timeline_of(data)
        seconds = tuple(map(float, data["seconds"]))
    except (KeyError, TypeError) as error:
        raise _not_a_report(found / TIMELINE_FILE, f"{type(error).__name__}: {error}") from error
    return MeasuredRun(
        losses=read_losses(found / LOSSES_FILE) if (found / LOSSES_FILE).exists() else (),
        timeline=timeline,
        steps_s=seconds,
    )


def timeline_of(data: Mapping[str, Any]) -> Timeline:
    """The spans of timeline.json, of one rank of each class. KeyError, TypeError for the data of another file."""
    alike = {int(rank): RankSet.parse(ranks) for rank, ranks in data.get("alike", {}).items()}
    return Timeline(tuple(Span(*span) for span in data["spans"]), FrozenMap(alike))


def read_losses(path: Path) -> tuple[dict[str, float], ...]:
    """One mapping of loss name -> value per step; a line that is still being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    return tuple({name: value for name, value in step.items() if name != "iteration"} for step in steps)


def describe_run(run: MeasuredRun, predicted: Timeline) -> dict[str, Any]:
    """Losses, seconds of the steps, and lanes by how far their seconds are from what was predicted, worst first."""
    lanes = sorted(diff(predicted, run.timeline), key=lambda lane: -abs(lane.predicted_s - lane.measured_s))
    stride = -(-len(run.losses) // MAX_LOSSES) or 1
    kept = run.losses[::stride]
    names = list(kept[0]) if kept else []
    return {
        "steps_s": list(run.steps_s),
        "stride": stride,
        "losses": {name: [_number(step[name]) for step in kept] for name in names},
        "lanes": [[lane.lane, lane.predicted_s, lane.measured_s] for lane in lanes],
    }


def _number(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # what is no number has no place on a curve


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_a_report(path, str(error)) from error


def _not_a_report(path: Path, got: str) -> ConfigError:
    return ConfigError(str(path), got=got, expected="the file that the run wrote", fix="train again")
