"""Closed forms against hand counts and published numbers: parameters, FLOPs, activation bytes, ring collectives."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.config import load_workload
from megatron_mosaic.cost_model.effects.comm import MeasuredComm, RingComm
from megatron_mosaic.cost_model.effects.counts import (
    count_activation_bytes,
    count_flops,
    count_parameters,
    module_parameters,
)
from megatron_mosaic.cost_model.effects.gradients import gradient_sync_s
from megatron_mosaic.cost_model.effects.memory import BF16, FP32, LaneMemory, Precision, precision_of, stage_memory
from megatron_mosaic.cost_model.effects.parameters import stage_parameters
from megatron_mosaic.cost_model.groups import Group, stage_groups
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import Operation, Part
from megatron_mosaic.cost_model.layers import count_layers
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan import Layout, RankSet, Recompute
from megatron_mosaic.plan.training import DEFAULT_SETUP, Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Role
from megatron_mosaic.schedules import Kind
from tests.cases import LLM, VISION, make_cluster, make_profile

GPT3 = ModuleConfig(
    name="gpt3", role=Role.backbone, num_layers=96, hidden_size=12288, num_heads=96, ffn_hidden_size=4 * 12288,
    tokens_per_item=2048, vocab_size=51200,
)  # fmt: skip


def stage(module: ModuleConfig, layout: Layout | None = None, number: int = 0, **changes) -> StageWork:
    """One stage of a module on ranks 0, 1, ... of one node; one item a unit, one unit a step."""
    layout = layout or Layout()
    size = layout.num_ranks // layout.pp
    fields = {
        "items": 1,
        "num_units": 1,
        "kinds": (Kind.F, Kind.B),
        "reaches_layers": True,
        "recompute": Recompute.none,
        "sequence_parallel": False,
        "share": 1.0,
        "groups": stage_groups(RankSet.block(number * size, size), layout, layout.num_ranks),
    }
    dense_layers, expert_layers = count_layers(module, layout, number)
    fields |= {"dense_layers": dense_layers, "expert_layers": expert_layers}
    return StageWork(module=module, layout=layout, first=number == 0, last=number == layout.pp - 1, **fields | changes)


def memory(work: StageWork, precision: Precision = BF16, setup: TrainingSetup = DEFAULT_SETUP) -> LaneMemory:
    return stage_memory(work, precision, setup)


def test_parameters_of_a_small_layer_by_hand():
    # h 64, f 256: QKV 64*192 + 192, projection 64*64 + 64, MLP 64*256 + 256 and 256*64 + 64, two norms of 2*64
    assert count_parameters(LLM, Part.layer) == 12480 + 4160 + 16640 + 16448 + 256
    assert count_parameters(LLM, Part.pre) == 128 * 64 + 64 * 64  # tokens, positions
    assert count_parameters(LLM, Part.post) == 128  # the final norm; logits share the embedding
    assert count_parameters(VISION, Part.pre) == 16 * 64 + 5 * 64  # positions; 4 inputs and a bias
    assert count_parameters(VISION, Part.post) == 128 + 65 * 64


def test_tp_splits_matrices_and_keeps_norms():
    # columns 12480 + 16640 and rows 4096 + 16384 are halved; row biases 2*64 and norms 256 are on both ranks
    assert count_parameters(LLM, Part.layer, 2) == (12480 + 16640 + 4096 + 16384) / 2 + 128 + 256


def test_parameters_of_published_models():
    # LLaMA-2-7B has 6.738e9 parameters with a separate output matrix of 32000*4096; here logits share the embedding
    llama = load_workload(["model=vlm_7b"]).by_name["llm"]
    assert module_parameters(llama) + 32000 * 4096 == pytest.approx(6.738e9, rel=1e-3)
    assert module_parameters(GPT3) == pytest.approx(174.6e9, rel=2e-3)  # Narayanan et al. 2021, eq. 2: 174.6e9
    vit = load_workload(["model=vlm_7b"]).by_name["vision"]
    assert module_parameters(vit) == pytest.approx(632e6, rel=0.01)  # ViT-H/14, Dosovitskiy et al. 2021


def test_flops_follow_the_published_formula():
    # Narayanan et al. 2021, eq. 3 without recomputation: forward and backward are 72 B s l h^2 (1 + s/6h + V/12lh)
    s, layers, h, v = GPT3.tokens_per_item, GPT3.num_layers, GPT3.hidden_size, GPT3.vocab_size
    expected = 72 * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    forward = layers * count_flops(GPT3, Part.layer) + count_flops(GPT3, Part.pre) + count_flops(GPT3, Part.post)
    assert 3 * forward == pytest.approx(expected, rel=1e-12)


def test_causal_attention_is_half():
    full, causal = (count_flops(replace(GPT3, causal=c), Part.layer) for c in (False, True))
    assert full - causal == pytest.approx(2 * 2048**2 * 12288)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_activation_bytes_follow_the_published_formula(tp):
    # Korthikanti et al. 2022, table 2, "tensor parallel (no sequence parallel)": sbh (10 + 24/t + 5as/ht)
    s, h, a = 2048, 12288, 96
    expected = s * h * (10 + 24 / tp + 5 * a * s / (h * tp))
    whole, fused = (
        count_activation_bytes(GPT3, Part.layer, tp, value_bytes=2, fused_attention=fused, dropout=True)
        for fused in (False, True)
    )
    assert whole == pytest.approx(expected)
    assert fused == pytest.approx(s * h * (10 + 24 / tp))


def test_static_bytes_are_megatrons_bytes_per_parameter():
    parameters = module_parameters(LLM)
    assert memory(stage(LLM)).static_bytes == 18 * parameters
    assert memory(stage(LLM), FP32).static_bytes == 16 * parameters
    assert memory(stage(replace(LLM, frozen=True))).static_bytes == 2 * parameters


def test_precision_follows_the_format():
    assert precision_of(TrainingSetup(format=Format.fp32)) == FP32
    sizes = {"fp16": 2, "bf16": 2, "fp8": 1, "mxfp8": 33 / 32, "nvfp4": 9 / 16}
    for name, product_bytes in sizes.items():
        expected = replace(BF16, name=name, product_bytes=product_bytes)
        assert precision_of(TrainingSetup(format=Format(name))) == expected
    assert not precision_of(TrainingSetup(fused_attention=False)).fused_attention


def test_gradients_weigh_what_their_format_says():
    parameters = module_parameters(LLM)
    setup = TrainingSetup(gradient_format=Format.bf16)
    static = memory(stage(LLM), precision_of(setup), setup).static
    assert (static.parameters, static.gradients, static.optimizer) == (2 * parameters, 2 * parameters, 12 * parameters)
    # and their all-reduce moves half
    comm = RingComm(make_cluster(4))
    whole, half = (
        gradient_sync_s(stage(LLM, Layout(dp=4)), comm, precision_of(each), each) for each in (DEFAULT_SETUP, setup)
    )
    assert whole - half == pytest.approx(1.5 * 2 * parameters / 100e9)


@pytest.mark.parametrize("gated", [False, True])
def test_low_formats_keep_inputs_of_products_as_they_are_read(gated):
    # in bytes per token, fp8: norms' inputs 4h, their outputs 2h, Q K V and attention's output 8h, its copy for the
    # projection h; fc1's output 2f (twice when gated), fc2's input f
    module = replace(LLM, gated=gated)
    h, f, tokens = module.hidden_size, module.ffn_hidden_size, module.tokens_per_item
    kept = count_activation_bytes(module, Part.layer, 1, value_bytes=2, fused_attention=True, product_bytes=1.0)
    assert kept == tokens * ((4 + 2 + 8 + 1) * h + (4 if gated else 2) * f + f)
    usual = count_activation_bytes(module, Part.layer, 1, value_bytes=2, fused_attention=True)
    assert usual == tokens * ((4 + 4 + 8) * h + (6 if gated else 4) * f)


@pytest.mark.parametrize(
    ("sharding", "parameters", "gradients", "optimizer"),
    [("none", 2, 4, 12), ("optimizer", 2, 4, 3), ("gradients", 2, 1, 3), ("parameters", 0.5, 1, 3)],
)
def test_four_ranks_share_what_their_sharding_says(sharding, parameters, gradients, optimizer):
    # Rajbhandari et al. 2020, figure 1, with Megatron's fp32 gradients and copies
    held = memory(stage(LLM, Layout(dp=4)), setup=TrainingSetup(sharding=Sharding(sharding))).static
    count = module_parameters(LLM)
    assert held.parameters == parameters * count
    assert held.gradients == gradients * count
    assert held.optimizer == optimizer * count
    assert (held.buffers > 0) == (sharding == "parameters")


def test_a_recomputed_unit_keeps_its_layers_inputs_and_works_on_one_layer():
    lanes = [memory(stage(LLM, items=2, recompute=each)) for each in (Recompute.none, Recompute.full)]
    kept, recomputed = (lane.unit for lane in lanes)
    inputs = 2 * 2 * LLM.tokens_per_item * LLM.hidden_size
    layer = 2 * count_activation_bytes(LLM, Part.layer, 1, value_bytes=2, fused_attention=True)
    assert kept.activations - recomputed.activations == LLM.num_layers * (layer - inputs)
    assert kept.logits == recomputed.logits == 2 * LLM.tokens_per_item * LLM.vocab_size * (2 + 4)
    assert lanes[1].workspace_bytes - lanes[0].workspace_bytes == layer


@pytest.mark.parametrize("number", [0, 1])
def test_a_unit_that_is_run_again_keeps_what_enters_and_leaves(number):
    """A stage of the encoder: items or hidden states come in, rows leave the last; the graph is there for a moment."""
    halves = Layout(pp=2)
    none, whole = (
        memory(stage(VISION, halves, number, items=3, recompute=each)) for each in (Recompute.none, Recompute.whole)
    )
    tokens = 3 * VISION.tokens_per_item
    width = VISION.input_size if number == 0 else VISION.hidden_size + VISION.output_size
    assert whole.unit_bytes == 2 * tokens * width
    assert whole.workspace_bytes - none.workspace_bytes == none.unit_bytes
    assert whole.static == none.static


def test_stages_share_the_module_but_for_tied_embeddings():
    halves = Layout(pp=2)
    both = sum(stage_parameters(stage(LLM, halves, number)) for number in (0, 1))
    assert both == module_parameters(LLM) + 128 * 64
    assert sum(stage_parameters(stage(VISION, halves, number)) for number in (0, 1)) == module_parameters(VISION)


def test_offloaded_encoders_keep_no_activations_on_the_device():
    offloads = TrainingSetup(offloads_encoders=True)
    assert memory(stage(VISION)).unit_bytes > memory(stage(VISION), setup=offloads).unit_bytes == 0
    assert memory(stage(LLM)).unit_bytes == memory(stage(LLM), setup=offloads).unit_bytes


def test_groups_are_what_their_ranks_say():
    # tp 2, cp 2, dp 2 on ranks 0-7 of nodes of 4; experts of two ranks
    found = stage_groups(RankSet.block(0, 8), Layout(tp=2, cp=2, dp=2, ep=2), 4)
    assert (found.tp, found.cp, found.ep) == (Group(2, 1, 2), Group(2, 1, 2), Group(2, 1, 2))
    assert (found.dp, found.expert_dp) == (Group(4, 2, 2), Group(4, 2, 2))
    # the first tp group that crosses nodes counts: ranks 2-5 of nodes of 4 are (2, 3), (4, 5); of nodes of 3 (2, 3)
    assert stage_groups(RankSet.block(2, 4), Layout(tp=2, dp=2), 4).tp == Group(2, 1, 2)
    assert stage_groups(RankSet.block(2, 4), Layout(tp=2, dp=2), 3).tp == Group(2, 2, 1)


RANKS = st.sets(st.integers(0, 40), min_size=1, max_size=24)
BLOCKS = st.builds(lambda first, size: {*range(first, first + size)}, st.integers(0, 20), st.integers(1, 60))


@given(RANKS | BLOCKS | st.builds(set.union, RANKS, BLOCKS), st.integers(1, 9), st.data())
def test_a_group_on_spans_is_the_group_of_its_ranks(ranks, gpus_per_node, data):
    each = sorted(ranks)
    start = data.draw(st.integers(0, len(each) - 1))
    positions = range(start, data.draw(st.integers(start + 1, len(each))), data.draw(st.integers(1, 5)))
    nodes = [each[position] // gpus_per_node for position in positions]
    expected = Group(len(nodes), len({*nodes}), min(map(nodes.count, nodes)))
    assert Group.of(RankSet.of(each), gpus_per_node, positions) == expected


alone = Group.on_one_node


def test_ring_formulas_by_hand():
    comm = RingComm(make_cluster(4))  # 100 GB/s, 1 us
    one_mb = 1e6
    assert comm.estimate(Operation.all_reduce, alone(4), one_mb) == pytest.approx(6e-6 + 1.5e-5)
    assert comm.estimate(Operation.all_gather, alone(4), one_mb) == pytest.approx(3e-6 + 0.75e-5)
    assert comm.estimate(Operation.reduce_scatter, alone(2), one_mb) == pytest.approx(1e-6 + 0.5e-5)
    assert comm.estimate(Operation.p2p, alone(2), one_mb) == pytest.approx(1e-6 + 1e-5)


def test_nodes_are_joined_by_the_slow_link_times_their_ports():
    comm = RingComm(make_cluster(8, gpus_per_node=4))  # 10 GB/s and 5 us between the two nodes
    assert comm.estimate(Operation.p2p, Group.pair(0, 4, 4), 1e6) == pytest.approx(5e-6 + 1e-4)
    assert comm.estimate(Operation.all_reduce, Group.pair(0, 4, 4), 1e6) == pytest.approx(2 * (5e-6 + 0.5e-4))
    # four ranks a node drive four ports; three hops inside a node and a tree of depth one between the two
    expected = 2 * (3e-6 + 2 * 5e-6 + 7 / 8 * 1e6 / 40e9)
    assert comm.estimate(Operation.all_reduce, Group(8, 2, 4), 1e6) == pytest.approx(expected)


@given(st.sampled_from(list(Operation)), st.integers(1, 8), st.floats(0, 1e9), st.floats(0, 1e9))
def test_comm_grows_with_bytes_and_is_free_alone(operation, n, a, b):
    comm = RingComm(make_cluster(8))
    low, high = (comm.estimate(operation, alone(n), size) for size in sorted((a, b)))
    assert low <= high
    if n == 1:
        assert high == 0


def test_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    comm = RingComm(make_cluster(4))
    everyone, size = alone(4), 12345.0
    parts = [comm.estimate(op, everyone, size) for op in (Operation.reduce_scatter, Operation.all_gather)]
    assert comm.estimate(Operation.all_reduce, everyone, size) == pytest.approx(sum(parts))


def test_all_to_all_across_nodes_sends_what_leaves_the_node():
    # two ranks on two nodes: half of what each sends crosses, through a port of 10 GB/s with 5 us
    cluster = make_cluster(2, gpus_per_node=1)
    assert RingComm(cluster).estimate(Operation.all_to_all, Group(2, 2, 1), 1e6) == pytest.approx(
        2 * 5e-6 + 0.5e6 / 10e9
    )


def test_groups_with_the_same_ends_are_not_the_same():
    # ranks 0, 1, 2, 15 of nodes of 8: one rank alone on its node; 0, 1, 8, 15: two on either
    uneven, even = (Group.of(RankSet.of(ranks), 8) for ranks in ((0, 1, 2, 15), (0, 1, 8, 15)))
    assert (uneven, even) == (Group(4, 2, 1), Group(4, 2, 2))
    comm = RingComm(make_cluster(16, gpus_per_node=8))
    assert comm.estimate(Operation.all_reduce, uneven, 1e6) > comm.estimate(Operation.all_reduce, even, 1e6)


def test_measured_comm_reads_the_lines():
    comm = MeasuredComm(FittedProfile(make_profile()))
    assert comm.estimate(Operation.all_reduce, alone(3), 1_000_000) == pytest.approx(1.1e-3)
    assert comm.estimate(Operation.p2p, alone(2), 1000) == pytest.approx(1.1e-4)
    assert comm.estimate(Operation.all_reduce, alone(1), 1000) == 0
