"""Timelines of a run: one rank of each class writes its own spans, into a file of its own. Nobody gathers.

DIR/timelines/PLAN_DIGEST/plan.yaml  rank-00000.jsonl  rank-00004.jsonl ...     a line a report

Spans are in seconds of the wall clock, which hosts share as far as it is kept in time; on one host they are exact.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Plan, RankSet
from megatron_mosaic.plan.plan_file import format_plan, load_plan
from megatron_mosaic.runtime.telemetry.appended import ITERATION, AppendedLines, read_lines
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.timeline import Span, Timeline

FOLDER, PLAN_FILE = "timelines", "plan.yaml"


def folder_of(directory: Path, plan: Plan) -> Path:
    """Where the timelines of a plan are, below the directory of a report."""
    return directory / FOLDER / hashlib.sha256(format_plan(plan).encode()).hexdigest()[:12]


def alike_ranks(plan: Plan) -> dict[int, RankSet]:
    """Representative -> the ranks of its class."""
    return {found.ranks.first: found.ranks for found in rank_classes(plan)}


def is_representative(plan: Plan, rank: int) -> bool:
    """Whether the rank speaks for its class: it is the lowest of those that run the same lanes."""
    return rank in alike_ranks(plan)


def on_wall_clock(spans: Sequence[Span]) -> list[Span]:
    """Spans of this host's monotonic clock, in order."""
    wall_s = time.time() - time.monotonic()
    return [Span(s.rank, s.lane, s.start_s + wall_s, s.end_s + wall_s, s.label) for s in sorted(spans)]


def from_the_start(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same in seconds from the first begin."""
    begin_s = min(span.start_s for span in spans)
    return tuple(sorted(Span(s.rank, s.lane, s.start_s - begin_s, s.end_s - begin_s, s.label) for s in spans))


class TimelineWriter:
    """Writes a representative's spans. Nothing is communicated."""

    def __init__(self, directory: Path, plan: Plan, rank: int) -> None:
        self._plan, self._rank, self._folder = plan, rank, folder_of(directory, plan)
        self._lines = AppendedLines(self._folder / f"rank-{rank:05d}.jsonl")

    def write(self, iteration: int, step_s: float, spans: Sequence[Span], *, since: int) -> None:
        """The spans of one step, on this host's monotonic clock. `since`: the first step of this start."""
        rows = [(span.lane, span.start_s, span.end_s, span.label) for span in on_wall_clock(spans)]
        self._lines.append(iteration, {"step_s": step_s, "spans": rows}, since=since)
        plan_file = self._folder / PLAN_FILE
        if not plan_file.exists():
            own = (
                self._folder / f".plan-{self._rank:05d}"
            )  # other representatives write it, too; a reader sees all or none
            own.write_text(format_plan(self._plan), encoding="utf-8")
            own.replace(plan_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """A step of a run as its classes' representatives saw it. `missing`: representatives that wrote nothing here."""

    iteration: int
    step_s: float
    timeline: Timeline
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPlan:
    """The timelines of one plan of a run, in the order of their iterations."""

    plan: Plan
    steps: tuple[MeasuredStep, ...]


def remove_timelines(directory: Path) -> None:
    """Before a run that goes on from no other: timelines of another plan would pass for its own."""
    if (directory / FOLDER).exists():
        shutil.rmtree(directory / FOLDER)


def read_timelines(directory: Path) -> Iterator[MeasuredPlan]:
    """What a run measured of each of its plans. ConfigError for a directory without a timeline."""
    folders = sorted(path for path in _report_of(directory).glob(f"{FOLDER}/*") if (path / PLAN_FILE).exists())
    if not folders:
        raise ConfigError(
            str(directory),
            got="no timelines",
            expected="the report of a training run: timelines/PLAN/rank-*.jsonl",
            fix="train with `mosaic train --report DIR` or `mosaic submit`, for a few steps",
        )
    for folder in folders:
        plan = load_plan(folder / PLAN_FILE)
        yield MeasuredPlan(plan=plan, steps=tuple(read_steps(folder, plan)))


def _report_of(directory: Path) -> Path:
    """The report of a run directory, or the directory itself."""
    return directory / "report" if (directory / "report" / FOLDER).is_dir() else directory


def read_steps(folder: Path, plan: Plan) -> Iterator[MeasuredStep]:
    """Steps that some representative wrote, begun at second 0."""
    of_step: dict[int, list[Span]] = {}
    step_s: dict[int, float] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        for line in read_lines(path):
            spans = [Span(rank, *span) for span in line["spans"]]
            of_step.setdefault(line[ITERATION], []).extend(spans)
            step_s[line[ITERATION]] = line["step_s"]
    alike = alike_ranks(plan)
    for iteration, spans in sorted(of_step.items()):
        yield MeasuredStep(
            iteration=iteration,
            step_s=step_s[iteration],
            timeline=Timeline(from_the_start(spans), FrozenMap(alike)),
            missing=tuple(sorted(alike.keys() - {span.rank for span in spans})),
        )
