"""Closed forms against torch's own counters on the layers that megatron-core builds: parameters, FLOPs, saved bytes.

The layers are the ones of the runtime (any2any.blocks), without Transformer Engine, on one rank of a world of its own.
"""

from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.enums import AttnMaskType
from torch.utils.flop_counter import FlopCounterMode

from megatron_mosaic.any2any.blocks import build_block
from megatron_mosaic.cost_model.effects.counts import (
    count_activation_bytes,
    count_attention_flops,
    count_flops,
    count_parameters,
)
from megatron_mosaic.cost_model.effects.kernels import layer_work
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan.training import DEFAULT_SETUP
from megatron_mosaic.plan.workload import ModuleConfig, Role
from megatron_mosaic.runtime.activation_meter import ActivationMeter

NUM_ITEMS = 2
FP32_BYTES = 4
CORE = "TransformerLayer.self_attention.core_attention"  # as FlopCounterMode names it

# LayerNorm and biases; bidirectional and causal
VIT = ModuleConfig(
    name="vit", role=Role.encoder, num_layers=1, hidden_size=64, num_heads=4, ffn_hidden_size=256, tokens_per_item=32
)
GPT = replace(VIT, name="gpt", role=Role.backbone, causal=True, tokens_per_item=48)
# RMSNorm, no biases
LLAMA = replace(GPT, name="llama", gated=True, num_query_groups=2, ffn_hidden_size=320)
MOE = replace(LLAMA, name="moe", ffn_hidden_size=96, num_experts=4, moe_top_k=2)
SHARED = replace(MOE, name="shared", shared_expert_size=80)
ALL = (VIT, GPT, LLAMA, MOE, SHARED)


def each(*modules: ModuleConfig) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", modules, ids=lambda module: module.name)


@pytest.fixture(scope="module")
def groups():
    """A world of one rank, which is every group. Gone before other tests fork ranks."""
    cpu.install()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    yield ProcessGroupCollection(**{f.name: dist.group.WORLD for f in fields(ProcessGroupCollection)})
    assert not parallel_state.is_initialized()
    dist.destroy_process_group()


@pytest.fixture
def build_layer(groups):
    """build_layer(module) -> one real layer of it in fp32, with dropout where the formulas take it to be used."""

    def build(module: ModuleConfig) -> TransformerLayer:
        dropout = 0.0 if module.gated else 0.1
        config = TransformerConfig(
            num_layers=1,
            hidden_size=module.hidden_size,
            num_attention_heads=module.num_heads,
            num_query_groups=module.query_groups,
            kv_channels=module.head_size,
            ffn_hidden_size=module.ffn_hidden_size,
            gated_linear_unit=module.gated,
            activation_func=F.silu if module.gated else F.gelu,
            bias_activation_fusion=module.gated,  # SwiGLU keeps its two inputs, not what it computes on the way
            add_bias_linear=not module.gated,
            normalization="RMSNorm" if module.gated else "LayerNorm",
            hidden_dropout=dropout,
            attention_dropout=dropout,
            num_moe_experts=module.num_experts or None,
            moe_router_topk=module.moe_top_k,
            moe_ffn_hidden_size=module.ffn_hidden_size if module.num_experts else None,
            moe_shared_expert_intermediate_size=module.shared_expert_size or None,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            transformer_impl="local",
            use_cpu_initialization=True,
        )
        mask = AttnMaskType.causal if module.causal else AttnMaskType.no_mask
        block = build_block(config, mask, is_last=False, chunk=0, pg_collection=groups)
        return block.layers[0].to(cpu.device())

    return build


def hidden_of(module: ModuleConfig) -> torch.Tensor:
    """[S, B, H] as from a layer before: it needs a gradient."""
    shape = (module.tokens_per_item, NUM_ITEMS, module.hidden_size)
    return torch.randn(shape, device=cpu.device(), requires_grad=True)


def measure_flops(layer: TransformerLayer, module: ModuleConfig) -> tuple[int, int, int]:
    """(forward, its part in the attention core, forward and backward) for NUM_ITEMS items. torch has no causal half."""
    with FlopCounterMode(display=False) as counter:
        output, _ = layer(hidden_of(module), attention_mask=None)
        forward, core = counter.get_total_flops(), sum(counter.get_flop_counts()[CORE].values())
        output.sum().backward()
    return forward, core, counter.get_total_flops()


def measure_saved_bytes(layer: TransformerLayer, module: ModuleConfig) -> tuple[float, float]:
    """(all, those of [S, S] per head) that one item's forward keeps for its backward; parameters do not count."""
    meter, matrices = ActivationMeter(), {}
    meter.ignore(layer)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (module.tokens_per_item, module.tokens_per_item):
            matrices[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with meter.forward(module.name, 0):
        kept = layer(hidden_of(module), attention_mask=None)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = kept, layer(hidden_of(module), attention_mask=None)  # alive: freed storages would be reused
    return meter.peak_bytes[module.name] / NUM_ITEMS, sum(matrices.values()) / NUM_ITEMS


@each(*ALL)
def test_parameters_are_those_of_the_layer(build_layer, module):
    """Exactly: plain layers with two LayerNorms and four biases, gated ones with two RMSNorms and no bias."""
    layer = build_layer(module)
    assert count_parameters(module, Part.layer) == sum(p.numel() for p in layer.parameters())


@each(*ALL)
def test_forward_flops_are_what_torch_counts(build_layer, module):
    forward, _, _ = measure_flops(build_layer(module), module)
    ratio = forward / (NUM_ITEMS * count_flops(replace(module, causal=False), Part.layer))
    assert ratio == pytest.approx(1, rel=0.01), f"torch / ours: {ratio:.4f}"


@each(*ALL)
def test_products_and_attention_are_what_torch_counts(build_layer, module):
    """Products of a mixture do not depend on the routing: it moves rows between experts of one width."""
    forward, core, _ = measure_flops(build_layer(module), module)
    work = layer_work(module, NUM_ITEMS, 1, 1, 1, False, not module.num_experts, DEFAULT_SETUP)
    assert sum(2 * g.m * g.n * g.k * g.count for g in work.gemms) == forward - core
    assert NUM_ITEMS * count_attention_flops(replace(module, causal=False)) == core
    unfused = replace(DEFAULT_SETUP, fused_attention=False)
    work = layer_work(module, NUM_ITEMS, 1, 1, 1, False, not module.num_experts, unfused)
    assert sum(2 * g.m * g.n * g.k * g.count for g in work.core_gemms) == core


@each(*ALL)
def test_backward_is_two_forwards(build_layer, module):
    forward, _, both = measure_flops(build_layer(module), module)
    assert both / forward == pytest.approx(3, rel=0.02), f"forward and backward / forward: {both / forward:.4f}"


@each(VIT, GPT)
def test_activation_bytes_are_what_autograd_saves(build_layer, module):
    """Within 15 %: on a CPU a dropout mask takes 4 bytes for the formula's 2; norms keep a mean and a deviation."""
    saved, _ = measure_saved_bytes(build_layer(module), module)
    ratio = saved / count_activation_bytes(
        module, Part.layer, 1, value_bytes=FP32_BYTES, fused_attention=False, dropout=True
    )
    assert ratio == pytest.approx(1, rel=0.15), f"saved / ours: {ratio:.4f}"


@each(*ALL)
def test_activation_bytes_without_attention_matrices(build_layer, module):
    """Within 15 %: besides masks, a CPU's RMSNorm keeps its rows once more, and GQA the repeated keys and values."""
    saved, matrices = measure_saved_bytes(build_layer(module), module)
    assert matrices
    ratio = (saved - matrices) / count_activation_bytes(
        module, Part.layer, 1, value_bytes=FP32_BYTES, fused_attention=True, dropout=not module.gated
    )
    assert ratio == pytest.approx(1, rel=0.15), f"saved / ours: {ratio:.4f}"
