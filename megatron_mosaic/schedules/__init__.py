"""In which order: schedules as data, their builders by name."""

from megatron_mosaic.schedules.builders import (
    PLANNED,
    SCHEDULES,
    build_forward_only,
    build_schedule,
    validate_schedule_name,
)
from megatron_mosaic.schedules.schedule import Action, Kind, Schedule

__all__ = [
    "PLANNED",
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "build_forward_only",
    "build_schedule",
    "validate_schedule_name",
]
