"""Builders of schedules, by name."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules.builders.interleaved import interleaved
from megatron_mosaic.schedules.builders.one_f_one_b import forward_only, one_f_one_b
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph

SCHEDULES: dict[str, Callable[[StageGraph], Schedule]] = {"1f1b": one_f_one_b, "interleaved": interleaved}
PLANNED = ("three_phase", "nested", "overlap", "bubble_fill", "waves")


def build_schedule(plan: Plan, workload: Workload, num_microbatches: int | None = None) -> Schedule:
    """The schedule that the plan names, for a step of `num_microbatches` (default: the plan's training step)."""
    graph = StageGraph.of(plan, workload, num_microbatches or plan.num_microbatches(workload.backbone.name))
    validate_schedule_name(plan.schedule.name)
    return SCHEDULES[plan.schedule.name](graph)


def validate_schedule_name(name: str) -> None:
    """Raise ScheduleError unless the schedule is built."""
    if name not in SCHEDULES:
        planned = " (a name of the plan format that is not built yet)" if name in PLANNED else ""
        raise ScheduleError(
            "schedule", got=name + planned, expected=f"one of {sorted(SCHEDULES)}", fix="set schedule: 1f1b"
        )


def build_forward_only(plan: Plan, workload: Workload, num_microbatches: int) -> Schedule:
    """The evaluation schedule: every forward, in order."""
    return forward_only(StageGraph.of(plan, workload, num_microbatches))
