"""The closed form of boundary traffic against the routes of the runtime, counted rank by rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.boundary_traffic import Traffic
from megatron_mosaic.cost_model.effects.boundary_traffic import boundary_traffic as traffic_of_lanes
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.worlds import BACKBONE, SEQUENCE, WIDTH, module

EDGE = Edge(source="encoder0", target=BACKBONE, rows_per_item=SEQUENCE, width=WIDTH)
WORKLOAD = Workload(
    name="random",
    modules=(module("encoder0", Role.encoder, tokens_per_item=SEQUENCE), module(BACKBONE, Role.backbone)),
    edges=(EDGE,),
)
SAMPLES = 24  # every number of slots divides it


def placed(ranks: str, *, sp: bool = False, **layout: int) -> ModulePlan:
    return ModulePlan(ranks=RankSet.parse(ranks), layout=Layout(**layout), sequence_parallel=sp)


def one_image_a_sample() -> Metadata:
    """Images as long as their samples: every shard of the tokens has rows of each."""
    each, zero, rows = np.arange(SAMPLES), np.zeros(SAMPLES, dtype=np.int64), np.full(SAMPLES, SEQUENCE)
    items = Items(each, rows)
    return Metadata(
        items={"encoder0": items, BACKBONE: items}, links={("encoder0", BACKBONE): Links(each, zero, each, zero, rows)}
    )


def make_plan(source: ModulePlan, target: ModulePlan) -> Plan:
    return Plan(
        workload="random",
        world_size=1 + max(source.ranks.last, target.ranks.last),
        global_batch_size=SAMPLES,
        micro_batch_size=SAMPLES // target.layout.dp,
        schedule=ScheduleChoice("1f1b"),
        modules={"encoder0": source, BACKBONE: target},
    )


def boundary_traffic(source: ModulePlan, target: ModulePlan) -> Traffic:
    lanes = list_stage_work(make_plan(source, target), WORKLOAD, 8).lanes
    return traffic_of_lanes(lanes[source.layout.pp - 1], lanes[source.layout.pp])


def count_rows(source: ModulePlan, target: ModulePlan) -> tuple[int, int]:
    """Most rows that a rank receives, and all rows that are sent."""
    plan = make_plan(source, target)
    received = [0] * plan.world_size
    for rank in target.stage_ranks(0).ranks:
        step_map = StepMap(PlanMap(RankView.of(plan, rank), WORKLOAD), [one_image_a_sample()])
        parts = step_map.receives(EdgeEnd.target_of(EDGE), 0, 0)
        received[rank] = sum(part.num_rows for part in parts if part.rank != rank)
    return max(received), sum(received)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (placed("0-3", tp=4), placed("0-3", dp=4)),  # every rank has all rows already
        (placed("0-3", dp=4), placed("0-3", tp=4)),
        (placed("0-3", dp=4), placed("0-3", dp=4)),
        (placed("0-3", dp=4), placed("0-3", tp=2, dp=2)),
        (placed("0-3", tp=2, dp=2), placed("0-3", dp=4)),
        (placed("0-1", dp=2), placed("2-3", dp=2)),
        (placed("0-1", tp=2), placed("2-5", dp=4)),
        (placed("0-3", dp=4), placed("0-3", cp=4)),
        (placed("0-3", cp=2, dp=2), placed("0-3", cp=2, dp=2)),
        (placed("0-3", tp=4, sp=True), placed("0-3", tp=4, sp=True)),
        (placed("0-3", dp=4), placed("0-3", tp=4, sp=True)),
        (placed("0-3", dp=2, pp=2), placed("2-3", dp=2)),
    ],
)
def test_regular_layouts_are_exact(source, target):
    traffic = boundary_traffic(source, target)
    most, total = count_rows(source, target)
    rows = SAMPLES * SEQUENCE
    assert traffic.received_frac * rows == pytest.approx(most)
    assert traffic.sent_frac * rows * source.layout.num_ranks / source.layout.pp == pytest.approx(total)


def test_on_nested_ranks_it_is_an_upper_bound():
    wide, narrow = placed("0-7", dp=8), placed("0-3", tp=2, dp=2)
    assert boundary_traffic(wide, narrow).received_frac * SAMPLES * SEQUENCE >= count_rows(wide, narrow)[0] > 0


@settings(max_examples=60)
@given(st.data())
def test_any_layout_of_slots_is_bounded(data):
    """On ranks that overlap anyhow no rank receives more: the runtime keeps items where they are needed."""
    placements = []
    for _ in range(2):
        tp, dp = data.draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1)]))
        ranks = data.draw(st.permutations(range(6)))[: tp * dp]
        placements.append(ModulePlan(ranks=RankSet.of(sorted(ranks)), layout=Layout(tp=tp, dp=dp)))
    most, _ = count_rows(*placements)
    assert boundary_traffic(*placements).received_frac * SAMPLES * SEQUENCE >= most - 1e-6


def test_on_partly_overlapping_ranks_more_may_be_sent_than_the_closed_form_says():
    source, target = placed("0,2,4", dp=3), placed("0-2,4", dp=4)
    traffic, (most, total) = boundary_traffic(source, target), count_rows(source, target)
    assert traffic.received_frac * SAMPLES * SEQUENCE >= most
    assert traffic.sent_frac * SAMPLES * SEQUENCE * 3 == pytest.approx(512)
    assert total == 640
