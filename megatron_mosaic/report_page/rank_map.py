"""Which modules sit on which GPU: a grid of nodes and GPUs, drawn from classes of alike ranks."""

from __future__ import annotations

from typing import Any

from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.plan import Plan
from megatron_mosaic.units import format_bytes

AXES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")


def describe_rank_map(plan: Plan, simulation: Simulation, backbone: str) -> dict[str, Any]:
    """Modules with their layouts, and classes: spans of ranks, [module, stage] of each lane, peak bytes of a rank.

    Ranks that are in no class run nothing.
    """
    work, peaks = simulation.price.work, simulation.class_peak_bytes
    units, tracks = plan.units(backbone), plan.tracks(backbone)
    names = list(plan.modules)
    lane = [(names.index(lane.module), lane.stage) for lane in work.lanes]
    return {
        "num_ranks": plan.world_size,
        "per_node": work.gpus_per_node,
        "modules": [
            {
                "name": name,
                "ranks": str(placed.ranks),
                "layout": str(placed.layout),
                "share": placed.quota.share,
                "unit": units[name],
                "track": tracks.get(name, 0),
                "recompute": placed.recompute.value,
                "stages": placed.layout.pp,
            }
            for name, placed in plan.modules.items()
        ],
        "classes": [
            {
                "ranks": [list(span) for span in alike.ranks.spans],
                "lanes": [lane[i] for i in lanes],
                "peak": format_bytes(peak),
            }
            for alike, lanes, peak in zip(work.classes, work.class_lanes, peaks)
        ],
    }
