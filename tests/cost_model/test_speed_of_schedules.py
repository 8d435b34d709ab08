"""How fast schedules are, by the clock alone: made-up durations, no transfers, closed forms.

Vision dp 4, llm pp 4, generator dp 4 on four ranks, 64 microbatches. Seconds of the backbone's stage: F 1, B 2; of a
microbatch on one replica of the encoder `encoder_s`, of the generator `generator_s`, twice that backward. A unit of 4
microbatches on four replicas takes as long as one on one."""

from dataclasses import replace
from functools import cache

import pytest

from megatron_mosaic.cost_model.clock.machine import OwnDevices
from megatron_mosaic.cost_model.clock.program import fold
from megatron_mosaic.cost_model.clock.replicas import SlotClasses
from megatron_mosaic.cost_model.clock.run import run_clock
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, ScheduleChoice
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Kind, build
from tests.cases import BACKBONE_ONLY, LLM, WORKLOAD, make_plan

PP, MICROBATCHES = 4, 64
GRID = [(encoder_s, generator_s) for encoder_s in (0.5, 1.0, 2.0) for generator_s in (0.25, 0.5, 1.0)]
UNLIMITED = ScheduleChoice("nested", FrozenMap({"warmup_units": MICROBATCHES}))


VLM = replace(WORKLOAD, modules=WORKLOAD.modules[:2], edges=WORKLOAD.edges[:1])


@cache
def _program(choice: ScheduleChoice, lockstep: bool, workload: Workload):
    layouts = {module.name: Layout(pp=PP) if module.name == "llm" else Layout(dp=4) for module in workload.modules}
    plan = make_plan({n: ("0-3", x) for n, x in layouts.items()}, workload=workload, global_batch_size=MICROBATCHES)
    plan = replace(plan, schedule=choice)
    work = list_stage_work(plan, workload, 4)
    occupies = [work.graph.occupies[lane] for lane in work.graph.lanes]
    classes = SlotClasses.one_each(occupies) if lockstep else work.replicas.classes
    return fold(build(choice, work.graph), work.graph, classes), [lane.module for lane in work.lanes]


def step_s(
    choice: ScheduleChoice, encoder_s: float, generator_s: float, *, lockstep: bool, workload: Workload = WORKLOAD
) -> float:
    """Seconds of a step; in lockstep all replicas of a lane start together."""
    program, modules = _program(choice, lockstep, workload)
    forward_s = {"llm": 1.0, "vision": encoder_s, "generator": generator_s}
    job_s = [forward_s[modules[lane]] * (1 if kind is Kind.F else 2) for lane, kind in program.jobs]
    return max(run_clock(program, job_s, [0.0] * len(program.links), OwnDevices())[1])


def pure_work_s(encoder_s: float, generator_s: float) -> float:
    """A rank's work, and the way through the backbone's pipeline and back."""
    return 3 * (MICROBATCHES + MICROBATCHES / PP * (encoder_s + generator_s) + PP - 1)


@pytest.mark.parametrize(("encoder_s", "generator_s"), GRID)
def test_nested_is_as_fast_as_with_unlimited_memory(encoder_s, generator_s):
    nested, unlimited = (
        step_s(choice, encoder_s, generator_s, lockstep=True) for choice in (ScheduleChoice("nested"), UNLIMITED)
    )
    assert nested <= 1.01 * unlimited


@pytest.mark.parametrize(("encoder_s", "generator_s"), GRID)
def test_replicas_that_run_free_reach_pure_work(encoder_s, generator_s):
    """W: the least and one more. A generator is ready when a replica has what its own microbatches need."""
    free = step_s(ScheduleChoice("nested"), encoder_s, generator_s, lockstep=False)
    assert free <= 1.02 * pure_work_s(encoder_s, generator_s)
    assert free <= step_s(UNLIMITED, encoder_s, generator_s, lockstep=False)
    assert free <= step_s(ScheduleChoice("nested"), encoder_s, generator_s, lockstep=True)


@pytest.mark.parametrize("encoder_s", [0.5, 1.0, 2.0])
def test_so_they_do_without_a_generator(encoder_s):
    free = step_s(ScheduleChoice("nested"), encoder_s, 0.0, lockstep=False, workload=VLM)
    assert free <= 1.02 * pure_work_s(encoder_s, 0.0)


def test_1f1b_waits_for_every_encoder_unit():
    once, nested = (step_s(ScheduleChoice(name), 0.5, 0.5, lockstep=True) for name in ("1f1b", "nested"))
    assert once > 1.5 * nested


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("v", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bubble_and_live_units_of_a_pipeline(p, v, groups):
    """Narayanan et al. 2021, section 2.2: bubble over work (p - 1)/(v m), of the step (p - 1)/(v m + p - 1); warm-up
    of stage s, 2 (p - s - 1) + (v - 1) p forwards and one (v = 1: p - s), are the units that live."""
    m = groups * p
    deep = replace(BACKBONE_ONLY, modules=(replace(LLM, num_layers=8),))
    choice = ScheduleChoice("interleaved" if v > 1 else "1f1b")
    plan = make_plan({"llm": (f"0-{p - 1}", Layout(pp=p, vpp=v))}, workload=deep, world_size=p, global_batch_size=m)
    work = list_stage_work(replace(plan, schedule=choice), deep, p)
    schedule = build(choice, work.graph)
    program = fold(schedule, work.graph, work.replicas.classes)
    job_s = [(1 if kind is Kind.F else 2) / v for _, kind in program.jobs]
    step = max(run_clock(program, job_s, [0.0] * len(program.links), OwnDevices())[1])
    bubble = step - 3 * m
    assert bubble / (3 * m) == pytest.approx((p - 1) / (v * m))
    assert bubble / step == pytest.approx((p - 1) / (v * m + p - 1))
    for s in range(p):
        warm = p - s if v == 1 else 2 * (p - s - 1) + (v - 1) * p + 1
        assert schedule.work.live_units(f"llm.{s}") == min(m * v, warm)
