"""Interleaved 1F1B (Narayanan et al. 2021, section 2.2): each stage holds several virtual stages, the bubble shrinks.

Units go through the virtual stages in groups as large as the pipeline is long: 2 stages, 2 chunks, 4 units:

    forwards   F0 F1 v1F0 v1F1 F2 F3 v1F2 v1F3        backwards   v1B0 v1B1 B0 B1 v1B2 v1B3 B2 B3

A stage warms up with some forwards, then alternates, then drains. Modules without virtual stages run 1F1B beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.builders.one_f_one_b import alternate, units_ahead
from megatron_mosaic.schedules.passes import schedule_in_turns
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph


def interleaved(graph: StageGraph) -> Schedule:
    """1F1B where modules with virtual stages interleave them. ScheduleError without any such module.

    Modules with virtual stages warm up by Narayanan's formula, and what feeds them, with virtual stages or without,
    runs ahead as far as that needs: the least that does not deadlock. Where no such order exists (units that the stages
    do not divide) they warm up longer; the longest runs all forwards first and never waits for a backward.
    """
    if not graph.num_chunks:
        raise ScheduleError(
            "schedule",
            got="interleaved, and no module with vpp above 1",
            expected="virtual stages to interleave",
            fix="set schedule: 1f1b, or give a module vpp",
        )
    longest = graph.num_microbatches * max(graph.num_chunks.values())
    for extra in range(longest + 1):
        if (schedule := _least_ahead(graph, extra, longest)) is not None:
            return schedule
    raise ScheduleError(
        "schedule: lanes", got="lanes that wait for each other", expected="an order", fix="report this plan"
    )


def _least_ahead(graph: StageGraph, extra: int, longest: int) -> Schedule | None:
    """The schedule whose feeding modules run ahead least; None if they would deadlock however far ahead they are.

    Running further ahead never hurts, so the least is found by doubling and halving.
    """
    low, high, best = -1, 0, _try(graph, extra, 0)
    while best is None and high < longest:
        low, high = high, min(longest, 2 * high + 1)
        best = _try(graph, extra, high)
    while best is not None and high - low > 1:
        middle = (low + high) // 2
        found = _try(graph, extra, middle)
        low, high, best = (middle, high, best) if found is None else (low, middle, found)
    return best


def _try(graph: StageGraph, extra: int, ahead: int) -> Schedule | None:
    """Modules with virtual stages warm up with `extra` forwards more; those that feed them with `ahead` microbatches
    more for each of them on the way."""
    lanes = {}
    for module, num_stages in graph.num_stages.items():
        feeds = -(-ahead * _interleaved_behind(graph, module) // graph.units[module])
        more = feeds * graph.chunks(module) + (extra if graph.chunks(module) > 1 else 0)
        for stage in range(num_stages):
            lanes[f"{module}.{stage}"] = interleave(graph, module, stage, units_ahead(graph, module, stage) + more)
    try:
        return schedule_in_turns("interleaved", graph, lanes)
    except ScheduleError:
        return None


def _interleaved_behind(graph: StageGraph, module: str) -> int:
    """The most modules with virtual stages on a way from this one, itself left out."""
    ways = [(graph.chunks(m) > 1) + _interleaved_behind(graph, m) for m in graph.consumers(module)]
    return max(ways, default=0)


def interleave(graph: StageGraph, module: str, stage: int, ahead: int) -> tuple[Action, ...]:
    """A lane whose units take turns on its chunks, with `ahead` forwards, and those that the chunks ask for, before the
    first backward (Narayanan et al. 2021: 2 (p - s - 1) + (v - 1) p within the module)."""
    num_stages, chunks = graph.num_stages[module], graph.chunks(module)
    if chunks > 1:
        ahead += num_stages - stage - 1 + (chunks - 1) * num_stages
    order = list(_turns(graph.num_units(module), num_stages, chunks))
    forwards = [Action(module, stage, Kind.F, unit, chunk) for unit, chunk in order]
    backwards = [Action(module, stage, Kind.B, unit, chunks - 1 - chunk) for unit, chunk in order]
    return alternate(forwards, backwards if module in graph.has_backward else [], ahead)


def _turns(num_units: int, num_stages: int, num_chunks: int) -> Iterator[tuple[int, int]]:
    """(unit, chunk) in the order of forwards: a group of units through chunk 0, then the same through chunk 1, ..."""
    for start in range(0, num_units, num_stages):
        group = range(start, min(start + num_stages, num_units))
        yield from ((unit, chunk) for chunk in range(num_chunks) for unit in group)
