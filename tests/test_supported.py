"""What this version does not execute is refused by the name it has in the plan file."""

from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Layout, ModulePlan, RankSet, Recompute
from megatron_mosaic.schedules import PLANNED
from megatron_mosaic.supported import require_supported_plan
from tests.cases import WORKLOAD, make_plan

PLAN = make_plan({"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("3", Layout())})
EVERYWHERE = RankSet.parse("0-3")


def with_module(name, **changes):
    return replace(PLAN, modules={**PLAN.modules, name: replace(PLAN.modules[name], **changes)})


@pytest.mark.parametrize("layout", [Layout(tp=2, cp=2), Layout(pp=4), Layout(dp=4, ep=2), Layout(tp=2, dp=2, etp=2)])
@pytest.mark.parametrize("name", ["vision", "llm"])
def test_every_layout_is_supported(name, layout) -> None:
    placed = ModulePlan(ranks=EVERYWHERE, layout=layout, sequence_parallel=layout.tp > 1, recompute=Recompute.selective)
    require_supported_plan(replace(PLAN, modules={**PLAN.modules, name: placed}), WORKLOAD)


@pytest.mark.parametrize("name", ["vision", "llm"])
def test_virtual_stages_need_the_interleaved_schedule(name) -> None:
    with pytest.raises(PlanError) as refused:
        require_supported_plan(with_module(name, layout=Layout(pp=2, vpp=2, dp=2), ranks=EVERYWHERE), WORKLOAD)
    assert (refused.value.where, refused.value.got) == (f"modules.{name}.layout.vpp", "2")
    interleaved = replace(with_module(name, layout=Layout(pp=2, vpp=2, dp=2), ranks=EVERYWHERE), schedule="interleaved")
    require_supported_plan(interleaved, WORKLOAD)


@pytest.mark.parametrize("schedule", [*PLANNED, "no-such"])
def test_schedule_is_refused_by_name(schedule) -> None:
    with pytest.raises(PlanError, match=r"schedule\n.*\n.*expected: one of .*1f1b") as refused:
        require_supported_plan(replace(PLAN, schedule=schedule), WORKLOAD)
    assert refused.value.got == schedule


def test_an_encoders_unit_may_be_long_and_the_backbones_is_its_microbatch() -> None:
    require_supported_plan(with_module("vision", unit=4), WORKLOAD)
    with pytest.raises(PlanError, match=r"modules\.llm\.unit"):
        require_supported_plan(with_module("llm", unit=2), WORKLOAD)
