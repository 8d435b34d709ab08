"""Collectives inside layers against hand counts: experts by dispatcher, sequence parallelism's second gather, links."""

from dataclasses import replace

import pytest

from megatron_mosaic.cost_model.effects.comm import RingComm
from megatron_mosaic.cost_model.effects.kernels import Gemm, gemm_s
from megatron_mosaic.cost_model.effects.layer_comm import LayerComm
from megatron_mosaic.cost_model.groups import Group, stage_groups
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan import Layout, RankSet
from megatron_mosaic.plan.training import Dispatcher, Format, TrainingSetup
from megatron_mosaic.schedules import Kind
from tests.cases import LLM, make_cluster
from tests.cost_model.effects.test_sizes_and_comm import stage

BF16_BYTES = 2
EXPERTS = replace(LLM, num_experts=16, moe_top_k=4, num_layers=2, tokens_per_item=4096)
TOKENS, HIDDEN = 4096, EXPERTS.hidden_size
FAST, SLOW = 100e9, 10e9  # of make_cluster's links; 1 us and 5 us


def layer_comm(cluster, setup: TrainingSetup | None = None) -> LayerComm:
    return LayerComm(cluster.gpu, RingComm(cluster), setup or TrainingSetup(), BF16_BYTES)


def experts_on(num_ranks: int, gpus_per_node: int) -> StageWork:
    layout = Layout(dp=num_ranks, ep=num_ranks)
    return stage(EXPERTS, layout, groups=stage_groups(RankSet.block(0, num_ranks), layout, gpus_per_node))


def test_alltoall_sends_every_choice_straight_to_its_rank():
    # two layers, there and back; of four copies three quarters leave a rank of four
    forward_s = layer_comm(make_cluster(4)).estimate(experts_on(4, 4), Kind.F)
    copies = 4 * TOKENS * HIDDEN * BF16_BYTES
    assert forward_s == pytest.approx(2 * 2 * (3e-6 + 3 / 4 * copies / FAST))


def test_alltoall_across_nodes_is_bound_by_the_network():
    # two nodes of two: half of the copies leave the node, through each rank's own port
    forward_s = layer_comm(make_cluster(4, gpus_per_node=2)).estimate(experts_on(4, 2), Kind.F)
    copies = 4 * TOKENS * HIDDEN * BF16_BYTES
    assert forward_s == pytest.approx(2 * 2 * (2 * 5e-6 + 1 / 2 * copies / SLOW))


def test_the_flex_dispatcher_crosses_once_to_a_node_and_pays_the_hop_inside():
    setup = TrainingSetup(expert_dispatcher=Dispatcher.flex)
    forward_s = layer_comm(make_cluster(4, gpus_per_node=2), setup).estimate(experts_on(4, 2), Kind.F)
    row = TOKENS * HIDDEN * BF16_BYTES
    nodes = 2 * (1 - (1 / 2) ** 4)  # different nodes of four even choices
    ranks = 4 * (1 - (3 / 4) ** 4)
    across_s = 2 * 5e-6 + 1 / 2 * nodes * row / SLOW
    hop_s = 1e-6 + 1 / 2 * ranks * row / FAST
    assert forward_s == pytest.approx(2 * 2 * (across_s + hop_s))
    alltoall_s = layer_comm(make_cluster(4, gpus_per_node=2)).estimate(experts_on(4, 2), Kind.F)
    assert forward_s < alltoall_s


@pytest.mark.parametrize("tokens", [64, 8192])
def test_sequence_parallelism_gathers_twice_in_its_backward(tokens):
    module = replace(LLM, tokens_per_item=tokens)
    cluster = make_cluster(4, flops_per_s=1e15)
    comm, layout = layer_comm(cluster), Layout(tp=4)
    plain, split = (stage(module, layout, sequence_parallel=each) for each in (False, True))
    assert comm.estimate(plain, Kind.F) == comm.estimate(split, Kind.F)
    added_s = comm.estimate(split, Kind.B) - comm.estimate(plain, Kind.B)
    h, f = module.hidden_size, module.ffn_hidden_size
    gather_s = 3e-6 + 3 / 4 * tokens * h * BF16_BYTES / FAST
    hidden_s = [gemm_s(cluster.gpu, Gemm(tokens, h, n), cluster.gpu.num_sms, Format.bf16) for n in (3 * h / 4, f / 4)]
    assert added_s == pytest.approx(module.num_layers * sum(max(0, gather_s - each) for each in hidden_s))
    assert added_s > 0
    frozen = stage(replace(module, frozen=True), layout, sequence_parallel=True)
    assert comm.estimate(frozen, Kind.B) == comm.estimate(plain, Kind.B)  # its matrices have no gradients


def test_links_inside_and_between_nodes_reach_shares_of_their_own():
    cluster = make_cluster(8, gpus_per_node=4)
    slow = replace(cluster, gpu=replace(cluster.gpu, intra_frac=0.5, network_frac=0.25))
    comm, size = RingComm(slow), 1e9
    inside, across = Group.on_one_node(4), Group(8, 2, 4)
    assert comm.estimate(Operation.all_gather, inside, size) == pytest.approx(3e-6 + 3 / 4 * size / (0.5 * FAST))
    # four ports of a quarter of 10 GB/s are less than half of 100 GB/s
    expected = 3e-6 + 2 * 5e-6 + 7 / 8 * size / (4 * 0.25 * SLOW)
    assert comm.estimate(Operation.all_gather, across, size) == pytest.approx(expected)
