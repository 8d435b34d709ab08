"""The simulator against the closed forms of pipelines of equal stages."""

from dataclasses import replace

import pytest

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.cost_model.simulate import Simulation, simulate, simulate_planned
from megatron_mosaic.plan import Layout, Plan, ScheduleChoice
from megatron_mosaic.plan.cluster import Link
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Kind
from tests.cases import BACKBONE_ONLY, LLM, make_cluster, make_plan

FREE = Link(name="free", bytes_per_s=1e300, latency_s=1e-300, source="made up for tests")


def _simulate_equal_stages(plan: Plan, workload: Workload, forward_s: float, backward_s: float) -> Simulation:
    """With communication for free and these seconds for every action."""
    price = CostModel(workload, replace(make_cluster(4), intra=FREE)).price(plan)
    action_s = {Kind.F: forward_s, Kind.B: backward_s}
    equal = tuple(replace(cost, action_s=action_s, gradients_s=0.0) for cost in price.costs)
    return simulate_planned(replace(price, costs=equal))


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_1f1b_closed_form(pp, m):
    # Equal stages and free communication: (p - 1 + m)(f + b), Narayanan et al. 2021, section 2.2
    plan = make_plan(
        {"llm": (f"0-{pp - 1}" if pp > 1 else "0", Layout(pp=pp))}, workload=BACKBONE_ONLY, global_batch_size=m
    )
    simulation = _simulate_equal_stages(plan, BACKBONE_ONLY, 1.0, 2.0)
    assert simulation.optimizer_start_s - simulation.price.consensus_s == pytest.approx((pp - 1 + m) * 3)
    if m >= pp:  # bubbles of a rank: (p - 1)/(m + p - 1) of the time before the tail
        spans = [s for s in simulation.timeline().spans if not s.label.startswith("~")]
        assert sum(s.end_s - s.start_s for s in spans if s.rank == 0) == pytest.approx(3 * m)


@pytest.mark.parametrize(("pp", "vpp"), [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("m", [4, 8])
def test_interleaved_closed_form(pp, vpp, m):
    """m(f + b) + (p - 1)(f + b)/v where p divides m, Narayanan et al. 2021, section 2.2."""
    deep = replace(BACKBONE_ONLY, modules=(replace(LLM, num_layers=8),))
    layout = Layout(pp=pp, vpp=vpp)
    plan = make_plan({"llm": (f"0-{pp - 1}", layout)}, workload=deep, global_batch_size=m)
    plan = replace(plan, schedule=ScheduleChoice("interleaved"))
    simulation = _simulate_equal_stages(plan, deep, 1.0 / vpp, 2.0 / vpp)
    expected = 3 * m + 3 * (pp - 1) / vpp
    assert simulation.optimizer_start_s - simulation.price.consensus_s == pytest.approx(expected)


def test_three_virtual_stages_leave_a_third_of_the_bubble():
    # GPT-3 175B on 8 stages, the last of which has the loss and decides: (m + (p - 1) / v) x stage, Narayanan et al.
    # 2021, section 2.2
    row = next(r for r in load_rows(PUBLISHED / "korthikanti2022_table5.csv") if r["row_id"].endswith("-0003"))
    bubble_s = {}
    for v in (1, 3):
        case = try_case(row | {"vpp": str(v)})
        assert isinstance(case, Case), case
        simulation = simulate(case.plan, CostModel(case.workload, replace(case.cluster, intra=FREE, inter=FREE)))
        bubble_s[v] = max(simulation.class_end_s) - max(cost.busy_s for cost in simulation.price.costs)
    assert bubble_s[1] / bubble_s[3] == pytest.approx(3, rel=0.02)
