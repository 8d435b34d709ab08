"""Windows, merging projectors, multi-token prediction and FSDP's buffers against hand counts and public models."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.compute import AnalyticCompute
from megatron_mosaic.cost_model.effects.counts import (
    count_attention_flops,
    count_flops,
    count_parameters,
    count_projector_parameters,
    module_parameters,
)
from megatron_mosaic.cost_model.effects.parameters import stage_parameters
from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.training import Sharding, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Role
from megatron_mosaic.schedules import Kind
from tests.cases import LLM, VISION
from tests.cost_model.effects.test_sizes_and_comm import memory, stage

# Qwen2.5-VL (Bai et al. 2025, table 1): 32 layers of 1280, MLP 3456 gated, 16 heads, windows of 112 pixels (64 patches
# of 14), 4 layers that see all, patches of 14 x 14 x 3 x 2 frames, 2 x 2 patches merged by an MLP
QWEN_VISION = ModuleConfig(
    name="vision", role=Role.encoder, num_layers=32, hidden_size=1280, num_heads=16, ffn_hidden_size=3456,
    tokens_per_item=1024, input_size=1176, output_size=3584, gated=True, merge_tokens=4, projector_size=5120,
    attention_window=64, num_full_attention_layers=4,
)  # fmt: skip


def test_parameters_of_a_public_vision_encoder():
    # 675M in the report; biases of its projections are left out here
    assert module_parameters(QWEN_VISION) == pytest.approx(675e6, rel=0.02)
    assert count_projector_parameters(QWEN_VISION) == 5121 * 5120 + 5121 * 3584


def test_windows_attend_to_their_own_tokens():
    whole = replace(QWEN_VISION, attention_window=0, num_full_attention_layers=0)
    # 28 layers of windows of 64 of 1024 tokens, 4 of all
    assert count_attention_flops(QWEN_VISION) == count_attention_flops(whole) * (28 * 64 / 1024 + 4) / 32
    assert count_attention_flops(whole) == 4 * 1024**2 * 1280


@given(tokens=st.integers(1, 200), window=st.integers(0, 250))
def test_a_causal_window_attends_to_the_tokens_before(tokens, window):
    module = replace(LLM, tokens_per_item=tokens, attention_window=window)
    at = np.arange(tokens)
    span = window or tokens
    pairs = sum(min(i + 1, span) for i in at)
    # the closed form counts half of the diagonal
    assert module.attended_tokens * tokens == pytest.approx(pairs - min(span, tokens) / 2)


def test_merged_tokens_leave_as_one_row():
    rows, width = 1024 / 4, 4 * 1280
    assert count_flops(QWEN_VISION, Part.post) == 2 * rows * (width * 5120 + 5120 * 3584)
    plain = replace(QWEN_VISION, merge_tokens=1, projector_size=0)
    assert count_flops(plain, Part.post) == 2 * 1024 * 1280 * 3584
    with pytest.raises(ConfigError, match="merge_tokens"):
        replace(QWEN_VISION, merge_tokens=3)


def test_a_trained_projector_of_two_matrices_behind_frozen_layers():
    gpu = load_gpu_type("h100_sxm")
    frozen = replace(QWEN_VISION, frozen=True, trains_projector=True)
    work = stage(frozen, reaches_layers=False)
    seconds = AnalyticCompute(gpu).estimate(work, Kind.B)
    flops = 2 * 256 * (2 * 5120 * 3584 + 5120 * 5120)  # both matrices, and what is between them
    assert seconds > flops / gpu.flops_per_s
    assert seconds < 0.05 * AnalyticCompute(gpu).estimate(stage(QWEN_VISION), Kind.B)


def test_multi_token_prediction_is_a_layer_a_join_and_a_second_loss():
    one = replace(LLM, num_mtp_layers=1)
    h, layer = LLM.hidden_size, count_parameters(LLM, Part.layer)
    norm = 2 * h
    assert module_parameters(one) - module_parameters(LLM) == layer + 2 * h * h + 3 * norm
    tokens = LLM.tokens_per_item
    assert count_flops(one, Part.post) == 2 * count_flops(LLM, Part.post) + 2 * tokens * 2 * h * h
    last, plain = (stage(module, Layout(pp=2), 1) for module in (one, LLM))
    assert last.layers == plain.layers + 1
    assert stage(one, Layout(pp=2), 0).layers == plain.layers
    assert memory(last).unit.logits == 2 * memory(plain).unit.logits


def test_untied_heads_are_not_kept_twice_but_for_the_next_tokens_embedding():
    halves = Layout(pp=2)
    embedding = LLM.vocab_size * LLM.hidden_size
    for changes, copies in (
        ({}, 1),  # tied: the last stage has a copy
        ({"untied_output": True}, 0),
        ({"untied_output": True, "num_mtp_layers": 1}, 1),
    ):
        module = replace(LLM, **changes)
        both = sum(stage_parameters(stage(module, halves, number)) for number in (0, 1))
        assert both == module_parameters(module) + copies * embedding


def test_fsdp_holds_two_layers_and_what_is_no_layer_and_one_layers_gradients():
    setup = TrainingSetup(sharding=Sharding.parameters)
    held = memory(stage(VISION, Layout(dp=4)), setup=setup).static
    layer = count_parameters(VISION, Part.layer)
    ends = count_parameters(VISION, Part.pre) + count_parameters(VISION, Part.post)
    assert held.buffers == 2 * (2 * layer + ends) + 4 * layer
