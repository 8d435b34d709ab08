"""What shall run: workload, cluster, plan. Values only, no torch, no hardware."""

from megatron_mosaic.plan.layout import Layout, ModulePlan, RankSet, Recompute
from megatron_mosaic.plan.plan import Plan, Prediction, ScheduleChoice
from megatron_mosaic.plan.quota import Quota
from megatron_mosaic.plan.validate import validate_plan

__all__ = [
    "Layout",
    "ModulePlan",
    "Plan",
    "Prediction",
    "Quota",
    "RankSet",
    "Recompute",
    "ScheduleChoice",
    "validate_plan",
]
