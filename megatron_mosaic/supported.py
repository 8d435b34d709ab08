"""What the runtime can execute today: one list, read by launcher and runtime; a test holds the planner to it."""

from __future__ import annotations

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules import SCHEDULES
from megatron_mosaic.workload import Workload


def require_supported_plan(plan: Plan, workload: Workload) -> None:
    """PlanError if the plan is legal but needs something this version does not execute."""
    if plan.schedule not in SCHEDULES:
        raise PlanError("schedule", got=plan.schedule, expected=f"one of {sorted(SCHEDULES)}", fix="set schedule: 1f1b")
    backbone = workload.backbone.name
    for name, module in plan.modules.items():
        if module.layout.vpp > 1 and plan.schedule != "interleaved":
            raise PlanError(
                f"modules.{name}.layout.vpp",
                got=module.layout.vpp,
                expected=f"1 with schedule {plan.schedule}",
                fix="set vpp: 1, or schedule: interleaved",
            )
        if name == backbone and module.unit > 1:
            raise PlanError(
                f"modules.{name}.unit", got=module.unit, expected="1: a unit counts its microbatches", fix="omit unit"
            )
