"""megatron_mosaic: plan and run the training of multimodal models on Megatron."""

from megatron_mosaic.errors import MosaicError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, validate_plan
from megatron_mosaic.plan.cluster import Cluster, GpuType, Link
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.workload import ModuleConfig, Workload
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.timeline import Timeline

__all__ = [
    "Cluster",
    "GpuType",
    "Layout",
    "Link",
    "ModuleConfig",
    "ModulePlan",
    "MosaicError",
    "Plan",
    "RankSet",
    "Schedule",
    "Timeline",
    "Workload",
    "load_plan",
    "save_plan",
    "validate_plan",
]
__version__ = "0.1.0"  # the one place: pyproject.toml reads it here
