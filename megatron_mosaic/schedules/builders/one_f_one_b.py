"""1F1B (PipeDream-Flush, Narayanan et al. 2021) over the whole module DAG.

A stage with d stages behind it warms up with d forwards, then alternates, then drains:

    vision.0 | F0 F1 F2 B0 F3 B1 B2 B3          d = 2
    llm.0    |    F0 F1 B0 F2 B1 F3 B2 B3       d = 1
    llm.1    |       F0 B0 F1 B1 F2 B2 F3 B3    d = 0
"""

from __future__ import annotations

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.passes import schedule_in_turns
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph


def one_f_one_b(graph: StageGraph) -> Schedule:
    """1F1B: at most d + 1 units of a stage are alive, whatever the batch size."""
    graph.require_no_chunks("1f1b")
    for source, target in graph.edges:
        if graph.units[target] > graph.units[source]:
            raise ScheduleError(
                f"modules.{target}.unit",
                got=graph.units[target],
                expected=f"at most {graph.units[source]}, the unit of {source} before it, with schedule 1f1b",
                fix=f"omit the unit of {target}",
            )
    lanes = {}
    for module, num_stages in graph.num_stages.items():
        units = range(graph.num_units(module))
        for stage in range(num_stages):
            forwards = [Action(module, stage, Kind.F, unit) for unit in units]
            backwards = [Action(module, stage, Kind.B, unit) for unit in units if module in graph.has_backward]
            lanes[f"{module}.{stage}"] = alternate(forwards, backwards, units_ahead(graph, module, stage))
    return schedule_in_turns("1f1b", graph, lanes)


def units_ahead(graph: StageGraph, module: str, stage: int) -> int:
    """Forwards that a stage runs before its first backward can come, beside the one that it belongs to."""
    behind, size = graph.stages_after(module, stage), graph.units[module]
    # A unit of k microbatches outlives k of its consumers' steps, so fewer units cover the same way.
    return -(-behind // size) + (1 if size > 1 and behind else 0)


def alternate[T](forwards: list[T], backwards: list[T], warmup: int) -> tuple[T, ...]:
    """So many forwards, then forward and backward in turn, then the backwards that are left."""
    if not backwards:
        return tuple(forwards)
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return (*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :])


def forward_only(graph: StageGraph) -> Schedule:
    """Every forward in order, no backward (evaluation)."""
    lanes = {
        f"{module}.{stage}": tuple(
            Action(module, stage, Kind.F, unit, chunk)
            for unit in range(graph.num_units(module))
            for chunk in range(graph.chunks(module))
        )
        for module, num_stages in graph.num_stages.items()
        for stage in range(num_stages)
    }
    return schedule_in_turns("forward_only", graph, lanes)
