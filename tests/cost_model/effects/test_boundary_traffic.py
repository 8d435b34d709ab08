"""The closed form of boundary traffic against the routes of the runtime, counted rank by rank."""

from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.boundary_traffic import Traffic, stage_message
from megatron_mosaic.cost_model.effects.boundary_traffic import boundary_traffic as traffic_of_lanes
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.cases import make_cluster
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


def boundary_traffic(source: ModulePlan, target: ModulePlan, gpus_per_node: int = 8) -> tuple[Traffic, Traffic]:
    lanes = list_stage_work(make_plan(source, target), WORKLOAD, gpus_per_node).lanes
    return traffic_of_lanes(lanes[source.layout.pp - 1], lanes[source.layout.pp], gpus_per_node)


def count_rows(source: ModulePlan, target: ModulePlan, gpus_per_node: int = 8) -> tuple[Traffic, Traffic]:
    """Most rows that a rank receives and sends, and all rows that are sent: inside nodes, and across them."""
    plan = make_plan(source, target)
    received, sent = np.zeros((2, plan.world_size)), np.zeros((2, plan.world_size))
    for rank in target.stage_ranks(0).ranks:
        step_map = StepMap(PlanMap(RankView.of(plan, rank), WORKLOAD), [one_image_a_sample()])
        for part in step_map.receives(EdgeEnd.target_of(EDGE), 0, 0):
            if part.rank != rank:
                crosses = int(part.rank // gpus_per_node != rank // gpus_per_node)
                received[crosses, rank] += part.num_rows
                sent[crosses, part.rank] += part.num_rows
    received, sent = received / (SAMPLES * SEQUENCE), sent / (SAMPLES * SEQUENCE)
    inside, across = (
        Traffic(received_frac=received[i].max(), sent_frac=sent[i].max(), total_frac=sent[i].sum()) for i in (0, 1)
    )
    return inside, across


@pytest.mark.parametrize("gpus_per_node", [1, 2, 4, 8])
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
def test_regular_layouts_are_exact(source, target, gpus_per_node):
    found, counted = (f(source, target, gpus_per_node) for f in (boundary_traffic, count_rows))
    for each, oracle in zip(found, counted):
        assert astuple(each) == pytest.approx(astuple(oracle))


def test_on_nested_ranks_it_is_an_upper_bound():
    wide, narrow = placed("0-7", dp=8), placed("0-3", tp=2, dp=2)
    assert boundary_traffic(wide, narrow)[0].received_frac >= count_rows(wide, narrow)[0].received_frac > 0


@settings(max_examples=60)
@given(st.data())
def test_any_layout_of_slots_is_bounded(data):
    """On ranks that overlap anyhow no rank receives more: the runtime keeps items where they are needed."""
    placements = []
    for _ in range(2):
        tp, dp = data.draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1)]))
        ranks = data.draw(st.permutations(range(6)))[: tp * dp]
        placements.append(ModulePlan(ranks=RankSet.of(sorted(ranks)), layout=Layout(tp=tp, dp=dp)))
    (found, _), (counted, _) = boundary_traffic(*placements), count_rows(*placements)
    assert found.received_frac >= counted.received_frac - 1e-6


@settings(max_examples=40)
@given(st.data())
def test_apart_every_layout_is_exact_on_both_links(data):
    """Ranks of their own for either module: no item has a reason to stay where it is."""
    choices = st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1)])
    (tp, dp), (other_tp, other_dp) = data.draw(choices), data.draw(choices)
    ranks = data.draw(st.permutations(range(8)))
    source = ModulePlan(ranks=RankSet.of(sorted(ranks[: tp * dp])), layout=Layout(tp=tp, dp=dp))
    rest = sorted(ranks[tp * dp :])[: other_tp * other_dp]
    if len(rest) < other_tp * other_dp:
        return
    target = ModulePlan(ranks=RankSet.of(rest), layout=Layout(tp=other_tp, dp=other_dp))
    gpus_per_node = data.draw(st.integers(1, 8))
    found, counted = (f(source, target, gpus_per_node) for f in (boundary_traffic, count_rows))
    for each, oracle in zip(found, counted):
        assert astuple(each) == pytest.approx(astuple(oracle))


def test_on_partly_overlapping_ranks_more_may_be_sent_than_the_closed_form_says():
    source, target = placed("0,2,4", dp=3), placed("0-2,4", dp=4)
    (found, _), (counted, _) = boundary_traffic(source, target), count_rows(source, target)
    assert found.received_frac >= counted.received_frac
    rows = SAMPLES * SEQUENCE
    assert found.total_frac * rows == pytest.approx(512)
    assert counted.total_frac * rows == pytest.approx(640)


def test_rows_that_stay_in_their_node_are_not_priced_at_the_network():
    """An encoder on every GPU (dp64) before a backbone of tp8 dp8 on the same 64: each of a node's 8 GPUs gets the
    rows of the 7 others over NVLink, nothing leaves the node."""
    vision = replace(WORKLOAD.by_name["encoder0"], tokens_per_item=576)
    edge = replace(EDGE, rows_per_item=576, width=4096)
    workload = replace(WORKLOAD, modules=(vision, WORKLOAD.backbone), edges=(edge,), global_batch_size=64)
    plan = Plan(
        workload="random",
        world_size=64,
        global_batch_size=64,
        micro_batch_size=8,
        schedule=ScheduleChoice("1f1b"),
        modules={"encoder0": placed("0-63", dp=64), BACKBONE: placed("0-63", tp=8, dp=8)},
    )
    cluster = make_cluster(64, gpus_per_node=8)
    seconds = CostModel(workload, cluster).price(plan).transfer_s(0, 1)
    num_bytes = 2 * 7 * 576 * 4096  # of 7 images, an image a GPU
    assert seconds == pytest.approx(num_bytes / cluster.intra.bytes_per_s + cluster.intra.latency_s, rel=1e-6)
    assert seconds < 0.2 * num_bytes / cluster.inter.bytes_per_s


@pytest.mark.parametrize(
    ("sp", "scattered", "ranks_that_share"),
    [(False, False, 2), (True, False, 2 * 4), (False, True, 2 * 4)],  # cp 2, tp 4
)
def test_a_pipeline_message_is_whole_without_sequence_parallelism(sp, scattered, ranks_that_share):
    source = placed("0-15", sp=sp, tp=4, cp=2, pp=2)
    lanes = list_stage_work(make_plan(source, placed("0-7", dp=8)), WORKLOAD, 8).lanes
    work = lanes[0].work
    whole = work.items * work.module.tokens_per_item * work.module.hidden_size
    inside, across = (stage_message(lanes[0], lanes[1], nodes, scattered) for nodes in (16, 8))
    assert (inside.intra_values, inside.inter_values) == (whole / ranks_that_share, 0)
    assert (across.intra_values, across.inter_values) == (0, whole / ranks_that_share)
