"""Builders of schedules, by name, and the merge of lanes into each rank's program."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedule import Schedule
from megatron_mosaic.schedules.chain import Chain
from megatron_mosaic.schedules.interleaved import interleaved
from megatron_mosaic.schedules.one_f_one_b import forward_only, one_f_one_b

SCHEDULES: dict[str, Callable[[Chain], Schedule]] = {"1f1b": one_f_one_b, "interleaved": interleaved}
PLANNED = ("three_phase", "nested", "overlap", "bubble_fill", "waves")


def build_schedule(plan: Plan, workload: Workload, num_microbatches: int | None = None) -> Schedule:
    """The schedule that the plan names, for a step of `num_microbatches` (default: the plan's training step)."""
    chain = Chain.of(plan, workload, num_microbatches or plan.num_microbatches(workload.backbone.name))
    validate_schedule_name(plan.schedule)
    return SCHEDULES[plan.schedule](chain)


def validate_schedule_name(name: str) -> None:
    """Raise ScheduleError unless the schedule is built."""
    if name not in SCHEDULES:
        planned = " (a name of the plan format that is not built yet)" if name in PLANNED else ""
        raise ScheduleError(
            "schedule", got=name + planned, expected=f"one of {sorted(SCHEDULES)}", fix="set schedule: 1f1b"
        )


def build_forward_only(plan: Plan, workload: Workload, num_microbatches: int) -> Schedule:
    """The evaluation schedule: every forward, in order."""
    return forward_only(Chain.of(plan, workload, num_microbatches))
