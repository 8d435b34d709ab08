"""Encoders forward for the whole batch, then the backbone, then encoders backward (Megatron's colocated MIMO mode).

    vision.0 | F0 F1 F2 F3                              B0 B1 B2 B3
    llm.0    |             F0 F1 B0 F2 B1 F3 B2 B3

No bubble is added, and the encoders' activations of the whole batch live through the middle. Generators run as in
`nested`: a unit at a time, behind the last stage.
"""

from __future__ import annotations

from megatron_mosaic.schedules.builders.backbone import run_backbone
from megatron_mosaic.schedules.builders.cuts import BEFORE_ALL, backwards, generator_forwards, lay_in_order
from megatron_mosaic.schedules.passes import schedule_in_order
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph


def three_phase(graph: StageGraph) -> Schedule:
    """All forwards of encoders, the backbone with its generators, all backwards of encoders."""
    clock = run_backbone(graph)
    others = generator_forwards(graph, clock)
    returned = backwards(graph, clock, others)
    encoders = [module for module in graph.num_stages if graph.reaches(module, graph.backbone)]
    forwards = {module: [BEFORE_ALL] * graph.num_units(module) for module in encoders}
    after_all = 1 + max(clock.end.values())
    late = {module: [after_all] * len(cuts) if module in forwards else cuts for module, cuts in returned.items()}
    return schedule_in_order("three_phase", graph, lay_in_order(graph, clock, forwards | others, late))
