"""`mosaic calibrate --from-run DIR`: a profile of this machine, corrected by what a training run measured.

  profile --simulate the run's plans--> predicted seconds: each module's forward and backward, optimizer, loading
  timelines of the run ---------------> measured seconds of the same
  a module's points of a kind times measured / predicted, again and again, until simulation and run agree

What does not agree after many corrections is said: the caller tells the user.

One factor for all points of a module and a kind: a run has seen one layout, and shapes of curves stay those of the
benchmark. Collectives stay as they were measured: inside actions they are part of what the factors correct.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from megatron_mosaic.config import Task
from megatron_mosaic.cost_model.hardware.profile import Profile
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.telemetry.timelines import MeasuredPlan, MeasuredStep
from megatron_mosaic.schedules.timeline import Timeline

OPTIMIZER, DATA = "~optimizer", "~data"  # of a step: one number each
_FIELDS = {"F": "forward_s", "B": "backward_s", "I": "backward_s", "W": "backward_s"}
_KIND = re.compile(r"(?:v\d+)?([FBIW])\d+")
_CLOSE, _MOST_ROUNDS = 2e-3, 30
_MOST = 50.0  # a larger factor is another machine, or another model

Seconds = Mapping[tuple[str, str], float]  # (module, field of a point) -> rank-seconds of a step; the optimizer's too


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOfPlan:
    """A plan of the run: what it is priced with, and its steps that all representatives saw."""

    plan: Plan
    task: Task
    steps: tuple[MeasuredStep, ...]

    @classmethod
    def of(cls, measured: MeasuredPlan, task: Task) -> RunOfPlan:
        """ConfigError where no step is complete: a host's files are missing."""
        steps = tuple(step for step in measured.steps if not step.missing)
        if not steps:
            missing = sorted({rank for step in measured.steps for rank in step.missing})
            raise ConfigError(
                f"--from-run, a plan of {measured.plan.world_size} ranks",
                got=f"no step with timelines of all classes of ranks; none of ranks {missing[:8]}",
                expected="rank-*.jsonl of every class",
                fix="give the directory that all hosts wrote into",
            )
        return cls(plan=measured.plan, task=task, steps=steps)

    @property
    def step_s(self) -> float:
        return statistics.median(step.step_s for step in self.steps)

    def measured(self) -> Seconds:
        """Median over the steps."""
        found = [seconds_of(step.timeline) for step in self.steps]
        return {key: statistics.median(one.get(key, 0.0) for one in found) for key in found[0]}

    def simulate(self, profile: Profile) -> Timeline:
        """The same with another profile."""
        return simulate(self.plan, replace(self.task, profile=profile).cost_model()).timeline()


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """`factors`: how much longer a module's forward, or backward, took than the old profile says. Steps in seconds, of
    each plan: as the old profile predicts it, as the new one does, as it was. `apart`: measured over predicted, of what
    no correction brought together."""

    profile: Profile
    factors: Mapping[tuple[str, str], float]
    apart: Mapping[tuple[str, str], float]
    steps_s: tuple[tuple[float, float, float], ...]


def correct(profile: Profile, runs: Sequence[RunOfPlan]) -> Corrected:
    """The profile under which the simulated seconds of the plans are those of the run."""
    before = [run.simulate(profile) for run in runs]
    measured = _sums(run.measured() for run in runs)
    profile = _loading(profile, measured.get((DATA, "seconds"), 0.0), runs)
    factors = {key: 1.0 for key, seconds in measured.items() if seconds > 0}
    timelines, found = [run.simulate(profile) for run in runs], profile
    ratios = _ratios(measured, factors, timelines)
    for _ in range(_MOST_ROUNDS):
        if not _apart(ratios):
            break
        factors = {key: factors[key] * ratios.get(key, 1.0) for key in factors}
        _require_the_same_machine(factors)
        found = _scaled(profile, factors)
        timelines = [run.simulate(found) for run in runs]
        ratios = _ratios(measured, factors, timelines)
    return Corrected(
        profile=found,
        factors={key: factor for key, factor in factors.items() if key in ratios},
        apart=_apart(ratios),
        steps_s=tuple((b.end_s, a.end_s, run.step_s) for b, a, run in zip(before, timelines, runs, strict=True)),
    )


def _ratios(measured: Seconds, keys: Iterable[tuple[str, str]], timelines: Iterable[Timeline]) -> Seconds:
    """Measured over simulated, where something was simulated."""
    predicted = _sums(map(seconds_of, timelines))
    return {key: measured[key] / predicted[key] for key in keys if predicted.get(key, 0.0) > 0}


def _apart(ratios: Seconds) -> Seconds:
    """Those that are not close to 1."""
    return {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) >= _CLOSE}


def seconds_of(timeline: Timeline) -> dict[tuple[str, str], float]:
    """Rank-seconds by module and kind, ranks that a representative stands for counted in."""
    found: dict[tuple[str, str], float] = {}
    for span in timeline.spans:
        match = _KIND.fullmatch(span.label.removeprefix(span.lane))
        if match or span.lane in (OPTIMIZER, DATA):
            key = (span.lane.partition(".")[0], _FIELDS[match[1]] if match else "seconds")
            seconds = timeline.num_ranks(span.rank) * (span.end_s - span.start_s)
            found[key] = found.get(key, 0.0) + seconds
    return found


def _sums(rows: Iterable[Seconds]) -> dict[tuple[str, str], float]:
    """Of several plans."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        for key, seconds in row.items():
            found[key] = found.get(key, 0.0) + seconds
    return found


def _loading(profile: Profile, rank_seconds: float, runs: Sequence[RunOfPlan]) -> Profile:
    """A profile that saw no seconds of loading a sample gets those of the run, for a factor to correct."""
    if profile.overheads.sample_s > 0:
        return profile
    loaded = sum(run.plan.global_batch_size * run.plan.world_size for run in runs)  # every rank loads all samples
    overheads = profile.overheads.model_copy(update={"sample_s": rank_seconds / loaded})
    return profile.model_copy(update={"overheads": overheads})


def _scaled(profile: Profile, factors: Mapping[tuple[str, str], float]) -> Profile:
    data: dict[str, Any] = profile.model_dump(mode="json")
    for module, by_tp in data["modules"].items():
        for by_threads in by_tp.values():
            for points in by_threads.values():
                for point in points:
                    for field in ("forward_s", "backward_s"):
                        point[field] *= factors.get((module, field), 1.0)
    for point in data["optimizer"]:
        point["seconds"] *= factors.get((OPTIMIZER, "seconds"), 1.0)
    data["overheads"]["sample_s"] *= factors.get((DATA, "seconds"), 1.0)
    origin = data["provenance"]["date"].partition(",")[0]
    data["provenance"]["date"] = f"{origin}, corrected by a run {datetime.now(UTC).strftime('%Y-%m-%d')}"
    return Profile.model_validate(data)


def _require_the_same_machine(factors: Mapping[tuple[str, str], float]) -> None:
    """Loading is of the data and of where it lies: its factor says nothing of the machine."""
    for (module, field), factor in factors.items():
        most = math.inf if module == DATA else _MOST
        if not 1 / most < factor < most:
            raise ConfigError(
                "--from-run",
                got=f"{field.removesuffix('_s')} of {module} {factor:.3g} times as long as in the profile",
                expected=f"a run of the profile's machine and model, within a factor of {_MOST:.0f}",
                fix="give the profile of the machine that ran it (--profile), or run `mosaic calibrate` there",
            )
