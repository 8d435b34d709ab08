"""In which order: schedules as data, their builders by name."""

from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.builders import (
    PLANNED,
    SCHEDULES,
    build,
    build_forward_only,
    build_schedule,
    stage_graph,
)
from megatron_mosaic.schedules.schedule import Schedule

__all__ = [
    "PLANNED",
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "build",
    "build_forward_only",
    "build_schedule",
    "stage_graph",
]
