"""Modules put on top of each other in arrays, against the prices of whole plans."""

from dataclasses import replace

import pytest

from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.plan import ScheduleChoice, validate_plan
from megatron_mosaic.search.evaluate import Evaluator
from megatron_mosaic.search.greedy import search_greedy
from megatron_mosaic.search.sketches.overlay import Overlay
from megatron_mosaic.search.space import SearchConfig, Space
from tests.cases import WORKLOAD, make_cluster
from tests.search.test_quality import FIRST_SEED, random_instance


def overlaid(space: Space, model: CostModel):
    return Evaluator(model=model, memory_frac=space.config.memory_frac).composer(space).overlaid(40, lambda: False)


@pytest.mark.parametrize("seed", range(8))
def test_estimates_are_those_of_the_prices(seed):
    """Under a schedule that may keep one unit alive, bytes are the bound's. Work without the collectives that a
    backward may hide is never more than the bound, and without any gradients it would be the busiest rank's."""
    instance = random_instance(FIRST_SEED + seed, 1500)
    for each in overlaid(instance.space, instance.model):
        price = instance.model.price(replace(each.plan, schedule=ScheduleChoice("three_phase")))
        assert each.bytes == pytest.approx(price.lower_bound_bytes, rel=1e-12)
        assert each.busy_s <= price.lower_bound_s * (1 + 1e-9)
        work_s = max(sum(price.costs[i].busy_s for i in lanes) for lanes in price.work.class_lanes)
        assert work_s * (1 - 1e-9) <= each.busy_s <= each.step_s


def test_plans_are_legal_and_of_every_kind():
    space = Space(workload=WORKLOAD, cluster=make_cluster(4), config=SearchConfig())
    plans = [each.plan for each in overlaid(space, CostModel(WORKLOAD, space.cluster))]
    for plan in plans:
        validate_plan(plan, WORKLOAD, space.cluster)
    ranks = [[placed.ranks for placed in plan.modules.values()] for plan in plans]
    assert any(len({*each}) == 1 for each in ranks), "none with all modules on the same ranks"
    assert any(not any(a.overlaps(b) for a in each for b in each if a != b) for each in ranks if len({*each}) == 3)
    assert any(a.overlaps(b) for each in ranks for a in each for b in each if a != b), "none that overlap partly"


def test_what_has_no_room_is_not_priced(monkeypatch):
    """Seven modules on sixteen ranks: more combinations of runs than are held at once."""
    task = load_task(["model=six_encoders", "cluster=h100_8x8", "cluster.num_nodes=2"])
    space = Space(workload=task.workload, cluster=task.cluster, config=task.search)
    monkeypatch.setattr(Overlay, "_priced", None)
    assert overlaid(space, task.cost_model()) == []


def test_when_time_is_over_no_more_numbers_of_samples_are_priced(monkeypatch):
    counted = list[int]()
    monkeypatch.setattr(Overlay, "_overlaid", lambda self, samples, keep: counted.append(samples) or iter(()))
    space = Space(workload=WORKLOAD, cluster=make_cluster(4), config=SearchConfig())
    overlay = Overlay(space, CostModel(WORKLOAD, space.cluster), {})
    overlay.leading([4, 8, 16], keep=1, is_over=lambda: len(counted) == 2)
    assert counted == [4, 8]


def test_when_time_is_over_nothing_is_overlaid(monkeypatch):
    space = Space(workload=WORKLOAD, cluster=make_cluster(4), config=SearchConfig())
    model = CostModel(WORKLOAD, space.cluster)
    monkeypatch.setattr(Overlay, "_overlaid", None)
    first = next(search_greedy(space, Evaluator(model=model, memory_frac=0.9), is_over=lambda: True))
    assert first.step_s > 0
