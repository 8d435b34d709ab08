"""The nested pipeline (BigMac, arXiv 2605.25451): encoder and generator work is laid into cuts through the backbone's
1F1B. At a cut every rank does the same other work, so all ranks shift alike and no bubble is added.

    backbone, p = 2, stage 0    F0 F1 F2 . B0 F3 B1 . ...
    encoder, U = 2, W = 2    F0 F1 ............... B0 F2 ...     a unit's last gradient has left stage 0: its backward,
    generator, G = 2              F0 B0 .........                then the forward of the unit W later

At most W units of an encoder and one of a generator are alive, whatever the batch. A generator's unit of G
microbatches makes the last stage hold G forwards, so stage 0 holds D = p + G - 1; with units of U microbatches an
encoder then needs W >= (U - 1 + D - 1) // U + 1, or a forward of the backbone would wait for a backward behind itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.actions import Kind
from megatron_mosaic.schedules.builders.backbone import run_backbone
from megatron_mosaic.schedules.builders.cuts import (
    backwards,
    encoder_forwards,
    generator_forwards,
    lay_in_order,
)
from megatron_mosaic.schedules.builders.one_f_one_b import alternate
from megatron_mosaic.schedules.passes import schedule_in_order, schedule_in_turns
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph

_SLACK = 1  # units beyond the least: replicas have no barrier, and the first to finish must not wait for the last


def nested(graph: StageGraph, warmup_units: int = 0) -> Schedule:
    """Encoders hold `warmup_units` (W) units (0: each its own least and one more), generators one.

    ScheduleError for a W below an encoder's least: names the least W that is legal, and shows who would wait for whom.
    """
    clock = run_backbone(graph)
    others = generator_forwards(graph, clock)
    returned = backwards(graph, clock, others)
    encoders = encoder_forwards(
        graph, clock, others, returned, lambda least: max(least, warmup_units) if warmup_units else least + _SLACK
    )
    forwards = encoders.forwards | others
    schedule = schedule_in_order("nested", graph, lay_in_order(graph, clock, forwards, returned))
    if warmup_units:
        _require_room(graph, schedule, warmup_units, encoders.least)
    return schedule


def _require_room(graph: StageGraph, schedule: Schedule, chosen: int, least: Mapping[str, int]) -> None:
    """ScheduleError if a module must hold more units than that. `schedule`: in which all hold enough."""
    if all(units <= chosen for units in least.values()):
        return
    module = max(least, key=lambda name: least[name])
    raise ScheduleError(
        "schedule.warmup_units",
        got=f"{chosen}, with units of {graph.units[module]} microbatches in {module}\n"
        + _render_too_few(graph, schedule, module, chosen),
        expected=f"at least {least[module]}: the backbone wants unit {chosen} before unit 0 has come back",
        fix=f"set warmup_units: {least[module]}, or omit it",
    )


def _render_too_few(graph: StageGraph, schedule: Schedule, module: str, chosen: int) -> str:
    """Where the lanes would stand if the module held only so many units."""
    lanes = dict(schedule.lanes)
    for lane in (f"{module}.{stage}" for stage in range(graph.num_stages[module])):
        forwards, backwards = (
            [[a for a in lanes[lane] if (a.kind is kind, a.unit) == (True, u)] for u in range(graph.num_units(module))]
            for kind in (Kind.F, Kind.B)
        )
        lanes[lane] = tuple(action for unit in alternate(forwards, backwards, chosen - 1) for action in unit)
    try:
        schedule_in_turns("nested", graph, lanes)
    except ScheduleError as error:
        return error.got
    raise AssertionError("they do not wait for each other")
