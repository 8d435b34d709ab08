"""The simulator against the closed forms of pipeline schedules."""

from dataclasses import replace

import pytest

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import price_plan
from megatron_mosaic.cost_model.simulate import prepare_program, simulate_program
from megatron_mosaic.plan import Layout, ScheduleChoice
from tests.cases import BACKBONE_ONLY, LLM, make_cluster, make_plan


def _gpu_model(workload) -> CostModel:
    return CostModel(workload, make_cluster(4))


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_1f1b_closed_form(pp, m):
    # Equal stages and free communication: (p - 1 + m)(f + b), Narayanan et al. 2021, section 2.2
    plan = make_plan(
        {"llm": (f"0-{pp - 1}" if pp > 1 else "0", Layout(pp=pp))}, workload=BACKBONE_ONLY, global_batch_size=m
    )
    price = price_plan(plan, _gpu_model(BACKBONE_ONLY))
    equal = tuple(replace(cost, forward_s=1.0, backward_s=2.0, gradients_s=0.0) for cost in price.costs)
    priced = prepare_program(replace(price, costs=equal))
    free = replace(priced, transfers=dict.fromkeys(priced.transfers, 0.0))
    simulation = simulate_program(free)
    assert simulation.optimizer_start_s - price.consensus_s == pytest.approx((pp - 1 + m) * 3)
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
    price = price_plan(replace(plan, schedule=ScheduleChoice("interleaved")), _gpu_model(deep))
    equal = tuple(replace(c, forward_s=1.0 / vpp, backward_s=2.0 / vpp, gradients_s=0.0) for c in price.costs)
    priced = prepare_program(replace(price, costs=equal))
    simulation = simulate_program(replace(priced, transfers=dict.fromkeys(priced.transfers, 0.0)))
    assert simulation.optimizer_start_s - price.consensus_s == pytest.approx(3 * m + 3 * (pp - 1) / vpp)
