"""What this version does not execute is refused by the name it has in the plan file."""

from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Layout, ModulePlan, RankSet, Recompute
from megatron_mosaic.schedules import PLANNED
from megatron_mosaic.supported import UNBUILT_AXES, require_supported_plan
from tests.cases import make_plan

PLAN = make_plan({"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("3", Layout())})
EVERYWHERE = RankSet.parse("0-3")
LAYOUTS = {
    "cp": Layout(cp=2, dp=2),
    "vpp": Layout(pp=2, vpp=2, dp=2),
    "ep": Layout(dp=4, ep=2),
    "etp": Layout(tp=2, dp=2, etp=2),
}


def with_llm(**changes):
    return replace(PLAN, modules={**PLAN.modules, "llm": replace(PLAN.modules["llm"], **changes)})


def test_tp_pp_and_dp_are_supported() -> None:
    require_supported_plan(PLAN)


def test_every_unbuilt_axis_has_a_case_here() -> None:
    assert set(UNBUILT_AXES) == set(LAYOUTS)


@pytest.mark.parametrize("axis", UNBUILT_AXES)
def test_axis_is_refused_by_name(axis) -> None:
    plan = replace(PLAN, modules={**PLAN.modules, "llm": ModulePlan(ranks=EVERYWHERE, layout=LAYOUTS[axis])})
    with pytest.raises(PlanError) as refused:
        require_supported_plan(plan)
    assert (refused.value.where, refused.value.got) == (f"modules.llm.layout.{axis}", "2")
    assert refused.value.fix == f"set {axis}: 1"


@pytest.mark.parametrize("schedule", [*PLANNED, "no-such"])
def test_schedule_is_refused_by_name(schedule) -> None:
    with pytest.raises(PlanError, match=r"schedule\n.*\n.*expected: one of .*1f1b") as refused:
        require_supported_plan(replace(PLAN, schedule=schedule))
    assert refused.value.got == schedule


def test_long_unit_is_refused() -> None:
    require_supported_plan(with_llm(unit=1))
    with pytest.raises(PlanError, match=r"modules\.llm\.unit"):
        require_supported_plan(with_llm(unit=2))


def test_selective_recomputation_is_refused() -> None:
    with pytest.raises(PlanError, match=r"modules\.llm\.recompute\n.*selective"):
        require_supported_plan(with_llm(recompute=Recompute.selective))
