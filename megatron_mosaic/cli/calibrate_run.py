"""`mosaic calibrate --from-run DIR`: the profile of the machine that trained, corrected by what the run measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_mosaic.calibrate.from_run import DATA, OPTIMIZER, Corrected, RunOfPlan, correct
from megatron_mosaic.cli.output import print_json, print_note, print_table
from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cost_model.hardware.profile import default_profile_path, load_profile, save_profile
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import LocalClusterSection
from megatron_mosaic.runtime.telemetry.timelines import read_timelines
from megatron_mosaic.units import format_seconds


def correct_by_run(arguments: argparse.Namespace) -> int:
    """Read the run's timelines, correct the profile, write it, say what changed."""
    if arguments.gpu_type is not None:
        raise ConfigError("--gpu-type", got="--from-run beside it", expected="one of the two", fix="leave one out")
    started = time.perf_counter()
    profile = load_profile(arguments.profile or default_profile_path())
    runs = list(_runs(arguments))
    found = correct(profile, runs)
    path = arguments.out or default_profile_path()
    save_profile(found.profile, path)
    for name, ratio in _by_name(found.apart).items():
        print_note(f"{name} took {ratio:.3g} times as long in the run as the corrected profile says: they do not agree")
    if arguments.json:
        steps = [dict(zip(("before_s", "after_s", "measured_s"), step, strict=True)) for step in found.steps_s]
        seconds = time.perf_counter() - started
        factors, apart = _by_name(found.factors), _by_name(found.apart)
        print_json({"profile": str(path), "seconds": seconds, "factors": factors, "apart": apart, "steps": steps})
    else:
        _print(found, runs, str(path))
    return 0


def _runs(arguments: argparse.Namespace) -> Iterator[RunOfPlan]:
    """The plans of the run, priced as the command line says."""
    for measured in read_timelines(Path(arguments.from_run)):
        planned = apply_overrides(measured.plan, arguments.overrides)
        if planned.cluster is not None and not isinstance(planned.cluster, LocalClusterSection):
            raise ConfigError(
                "--from-run",
                got=f"a run of a plan for {planned.cluster.name}",
                expected="cluster: local, whose profile this is",
                fix="measure constants of a GPU with `mosaic calibrate --gpu-type`, or say cluster=local",
            )
        yield RunOfPlan.of(measured, planned.build_task(arguments.profile))


def _by_name(factors: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """By what the user reads: `vision forward`, `optimizer`."""
    names = {OPTIMIZER: "optimizer", DATA: "loading"}
    return {
        names.get(module, f"{module} {field.removesuffix('_s')}"): factor for (module, field), factor in factors.items()
    }


def _print(found: Corrected, runs: Sequence[RunOfPlan], path: str) -> None:
    rows = [(name, f"{factor:.3f}") for name, factor in _by_name(found.factors).items()]
    steps = sum(len(run.steps) for run in runs)
    print_table(f"{steps} steps of {len(runs)} plans", ("of a step", "run / profile"), rows)
    for before_s, after_s, measured_s in found.steps_s:
        before, after = (f"{format_seconds(s)} ({s / measured_s - 1:+.0%})" for s in (before_s, after_s))
        print(f"step: measured {format_seconds(measured_s)}, predicted {before} before, {after} now")
    print(f"{found.profile.title}, written to {path}")
