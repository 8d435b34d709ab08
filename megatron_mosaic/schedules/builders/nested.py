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

from megatron_mosaic.schedules.builders.backbone import run_backbone
from megatron_mosaic.schedules.builders.cuts import (
    backwards,
    encoder_forwards,
    generator_forwards,
    hold_units,
    lay_in_order,
)
from megatron_mosaic.schedules.passes import schedule_in_order
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph

_SLACK = 1  # units beyond the least: replicas have no barrier, and the first to finish must not wait for the last


def nested(graph: StageGraph, warmup_units: int = 0) -> Schedule:
    """Encoders hold `warmup_units` (W) units (0: each its own least and one more), generators one.

    ScheduleError for a W below an encoder's least, and names it.
    """
    clock = run_backbone(graph)
    others = generator_forwards(graph, clock)
    returned = backwards(graph, clock, others)
    encoders = encoder_forwards(graph, clock, others, returned, hold_units(graph, warmup_units, _SLACK))
    return schedule_in_order("nested", graph, lay_in_order(graph, clock, encoders | others, returned))
