"""The schedule of a plan's training steps: its own, or one from a file in which all but the order is the plan's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.quota import require_sum, shares_of_tracks
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules.actions import Kind
from megatron_mosaic.schedules.builders import build_schedule, stage_graph
from megatron_mosaic.schedules.passes import modules_by_track
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph
from megatron_mosaic.schedules.text import load_schedule


def load_training_schedule(plan: Plan, workload: Workload, path: str | Path | None) -> Schedule:
    """The schedule that training steps of the plan run: that of the file, if there is one.

    QuotaError where tracks of a rank ask for more than its device.
    """
    if path is None:
        schedule = build_schedule(plan, workload)
    else:
        graph = stage_graph(plan, workload)
        schedule = load_schedule(path, graph)
        require_schedule_of(graph, schedule)
    require_shares(plan, schedule.tracks)
    return schedule


def require_shares(plan: Plan, track_of: Mapping[str, int]) -> None:
    """QuotaError unless the modules beside each other on a rank ask for no more than its device in all. `track_of`:
    lane -> track, at least of those off track 0."""
    if not any(track_of.values()):
        return
    for alike in rank_classes(plan):
        tracks = modules_by_track(track_of, alike.lanes)
        if len(tracks) > 1:
            names = {track: " and ".join(modules) for track, modules in tracks.items()}
            shares = shares_of_tracks({t: [plan.modules[m].quota.share for m in tracks[t]] for t in tracks})
            require_sum({names[track]: share for track, share in shares.items()}, f"on ranks {alike.ranks}")


def require_schedule_of(graph: StageGraph, schedule: Schedule) -> None:
    """ScheduleError unless modules, stages, chunks, units, edges and microbatches are the plan's, and every module that
    has a backward runs it, undivided."""
    work = schedule.work
    full, forward = frozenset({Kind.F, Kind.B}), frozenset({Kind.F})
    for what, got, expected in (
        ("modules", set(work.units), set(graph.units)),
        ("edges", set(work.edges), set(graph.edges)),
        ("microbatches", work.num_microbatches, graph.num_microbatches),
        ("units", dict(work.units), dict(graph.units)),
        ("stages", dict(work.num_stages), dict(graph.num_stages)),
        ("chunks", dict(work.num_chunks), {module: graph.chunks(module) for module in graph.units}),
        ("kinds", dict(work.kinds), {m: full if m in graph.has_backward else forward for m in graph.units}),
    ):
        if got != expected:
            is_split = any(Kind.W in kinds for kinds in work.kinds.values())
            raise ScheduleError(
                f"schedule {schedule.name!r}: {what}",
                got=_short(got),
                expected=f"{_short(expected)}, as in the plan",
                fix="split backwards are not built yet: use B" if is_split else "only the order is free",
            )


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(inner)}" for key, inner in value.items())
    if isinstance(value, (set, frozenset)):
        return ", ".join(sorted(">".join(part) if isinstance(part, tuple) else str(part) for part in value)) or "none"
    return str(value)
