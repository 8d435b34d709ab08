"""What the runtime can execute today: one list, read by launcher and runtime; a test holds the planner to it."""

from __future__ import annotations

from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.plan import Plan, Recompute
from megatron_mosaic.schedules import SCHEDULES
from megatron_mosaic.workload import Workload

UNBUILT_AXES = ("cp", "vpp", "ep", "etp")  # legal in a plan file, refused by this runtime unless 1


def require_supported_plan(plan: Plan) -> None:
    """PlanError if the plan is legal but needs something this version does not execute."""
    if plan.schedule not in SCHEDULES:
        raise PlanError("schedule", got=plan.schedule, expected=f"one of {sorted(SCHEDULES)}", fix="set schedule: 1f1b")
    for name, module in plan.modules.items():
        for axis in UNBUILT_AXES:
            if getattr(module.layout, axis) != 1:
                raise PlanError(
                    f"modules.{name}.layout.{axis}",
                    got=getattr(module.layout, axis),
                    expected=f"1: this version does not execute {axis} yet",
                    fix=f"set {axis}: 1",
                )
        if module.unit > 1:
            raise PlanError(
                f"modules.{name}.unit",
                got=module.unit,
                expected="1: longer units are not executed yet",
                fix="omit unit",
            )
        if module.sequence_parallel:
            raise PlanError(
                f"modules.{name}.sequence_parallel", got="true", expected="false: not executed yet", fix="leave it out"
            )
        if module.recompute is Recompute.selective:
            raise PlanError(
                f"modules.{name}.recompute",
                got="selective",
                expected="none or full: selective recomputation is not executed yet",
                fix="use full",
            )


def require_supported_workload(workload: Workload) -> None:
    """ConfigError if the model needs something this version does not execute."""
    for module in workload.modules:
        if module.frozen:
            raise ConfigError(
                f"module {module.name!r}",
                got="frozen",
                expected="trained: freezing is not executed yet",
                fix="train it",
            )
    for edge in workload.edges:
        if workload.backbone.name not in (edge.source, edge.target):
            raise ConfigError(
                f"edge {edge.source}->{edge.target}",
                got="an edge between two modules beside the backbone",
                expected=f"one end to be {workload.backbone.name}: other edges are not executed yet",
                fix="route it through the backbone",
            )
