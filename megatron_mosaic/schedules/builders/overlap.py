"""Modules beside the backbone: the schedule of spatial sharing. An encoder is one unit ahead of the backbone and one
behind it, on a track of its own; a generator works on a unit while the last stage goes on with the next one.

    track 0   llm         F0 B0  |  F1 B1  |  F2 B2  |  F3 B3
    track 1   vision  F0  F1     |  B0 F2  |  B1 F3  |  B2        B3

The order is that of `nested` with a unit more than the least: whoever runs it in turns still holds few units. Which
modules have tracks of their own is the plan's matter (their quotas); all others take turns.
"""

from __future__ import annotations

from megatron_mosaic.schedules.builders.backbone import run_backbone
from megatron_mosaic.schedules.builders.cuts import (
    backwards,
    encoder_forwards,
    generator_forwards,
    lay_in_order,
)
from megatron_mosaic.schedules.passes import schedule_in_order
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph

_AHEAD = 1  # units beyond the least: while the backbone is at one, the encoder makes the next


def overlap(graph: StageGraph) -> Schedule:
    """Encoders hold one unit more than the backbone makes them; behind generators that take no turns with it, the
    backbone holds a unit more of theirs."""
    beside = frozenset(m for m in graph.num_stages if not graph.takes_turns(m, graph.backbone))
    clock = run_backbone(graph, beside)
    others = generator_forwards(graph, clock)
    returned = backwards(graph, clock, others)
    forwards = encoder_forwards(graph, clock, others, returned, lambda least: least + _AHEAD).forwards | others
    return schedule_in_order("overlap", graph, lay_in_order(graph, clock, forwards, returned))
