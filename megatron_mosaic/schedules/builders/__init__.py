"""Builders of schedules, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan, ScheduleChoice
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules.builders.bubble_fill import bubble_fill
from megatron_mosaic.schedules.builders.interleaved import interleaved
from megatron_mosaic.schedules.builders.nested import nested
from megatron_mosaic.schedules.builders.one_f_one_b import forward_only, one_f_one_b
from megatron_mosaic.schedules.builders.overlap import overlap
from megatron_mosaic.schedules.builders.three_phase import three_phase
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph


@dataclass(frozen=True, slots=True)
class Builder:
    """A pure function from a graph (and parameters, by keyword) to a schedule."""

    build: Callable[..., Schedule]
    parameters: tuple[str, ...] = ()


SCHEDULES = {
    "1f1b": Builder(one_f_one_b),
    "interleaved": Builder(interleaved),
    "three_phase": Builder(three_phase),
    "nested": Builder(nested, ("warmup_units",)),
    "overlap": Builder(overlap),
    "bubble_fill": Builder(bubble_fill),
}
PLANNED = ("waves",)


def build_schedule(plan: Plan, workload: Workload, num_microbatches: int = 0) -> Schedule:
    """The schedule that the plan names, for a step of `num_microbatches` (0: those of the plan's training step)."""
    return build(plan.schedule, stage_graph(plan, workload, num_microbatches))


def build_forward_only(plan: Plan, workload: Workload, num_microbatches: int) -> Schedule:
    """The evaluation schedule: every forward, in order."""
    return forward_only(stage_graph(plan, workload, num_microbatches))


def stage_graph(plan: Plan, workload: Workload, num_microbatches: int = 0) -> StageGraph:
    """The plan as stages, for a step of `num_microbatches` (0: those of the plan's training step)."""
    return StageGraph.of(plan, workload, num_microbatches or plan.num_microbatches(workload.backbone.name))


@lru_cache(maxsize=512)
def build(choice: ScheduleChoice, graph: StageGraph) -> Schedule:
    """The schedule of a graph; kept, since a search meets the same ones again. ScheduleError for what is not built,
    a parameter that the builder does not know, or a graph that it cannot order."""
    validate_schedule_choice(choice)
    return SCHEDULES[choice.name].build(graph, **choice.parameters)


def validate_schedule_choice(choice: ScheduleChoice) -> None:
    """Raise ScheduleError unless the schedule is built and takes these parameters."""
    if choice.name not in SCHEDULES:
        planned = " (a name of the plan format that is not built yet)" if choice.name in PLANNED else ""
        raise ScheduleError(
            "schedule", got=choice.name + planned, expected=f"one of {sorted(SCHEDULES)}", fix="set schedule: 1f1b"
        )
    known = SCHEDULES[choice.name].parameters
    for key in choice.parameters:
        if key not in known:
            raise ScheduleError(
                f"schedule.{key}",
                got=choice.parameters[key],
                expected=f"a parameter of {choice.name}: {', '.join(known) or 'it has none'}",
                fix=f"remove {key}",
            )
