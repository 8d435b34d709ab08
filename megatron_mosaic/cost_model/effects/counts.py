"""What a module weighs: parameters, FLOPs, activation bytes of its parts. Closed forms, no hardware.

Shapes follow Megatron's layer: QKV [h, h + 2 kv], projection [h, h], MLP [h, f] (twice when gated) and [f, h].
A gated module is taken to be LLaMA-like (RMSNorm, no biases), any other GPT-like (LayerNorm, biases).
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mosaic.cost_model.effects.kernels import (
    Gemm,
    attention_gemms,
    head_gemms,
    mean_head_size,
    mlp_gemms,
    projector_gemms,
)
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.plan.training import Recomputed
from megatron_mosaic.plan.workload import ModuleConfig


def _kv_size(module: ModuleConfig) -> int:
    return module.head_size * module.query_groups


def _norm_size(module: ModuleConfig) -> int:
    """Parameters of one norm: RMSNorm has weights only."""
    return module.hidden_size if module.gated else 2 * module.hidden_size


def count_expert_parameters(module: ModuleConfig, ep: int, etp: int = 1) -> float:
    """Parameters of the routed experts of one layer on one rank."""
    wide = 3 if module.gated else 2
    return module.num_experts / (ep * etp) * wide * module.hidden_size * module.ffn_hidden_size


def _count_wide(module: ModuleConfig, tp: int, dense: bool) -> float:
    """Parameters on one rank of a layer of a mixture (without its routed experts), or with latent attention."""
    h, wide, latent = module.hidden_size, 3 if module.gated else 2, module.kv_latent_size
    heads, size = module.num_heads, module.head_size
    if latent:
        query = module.q_latent_size or h
        attention = query * heads * (size + 64) + 2 * latent * heads * size + h * heads * size
        whole = h * (latent + 64) + (h * query if module.q_latent_size else 0)
    else:
        attention, whole = h * (2 * heads * size + 2 * _kv_size(module)), 0
    router = 0 if dense else h * module.num_experts
    mlp = _mlp_size(module) if dense else module.shared_expert_size
    return (attention + wide * h * mlp) / tp + whole + router + 2 * _norm_size(module)


def _mlp_size(module: ModuleConfig) -> int:
    """Width of a dense MLP."""
    return module.dense_ffn_size if module.num_experts else module.ffn_hidden_size


def count_parameters(module: ModuleConfig, part: Part, tp: int = 1, ep: int = 1, *, dense: bool | None = None) -> float:
    """Parameters of one part on one rank of a tp group; `layer`: of one layer, with experts if the module has any
    unless it is a `dense` one."""
    h, f, kv = module.hidden_size, module.ffn_hidden_size, _kv_size(module)
    q = module.num_heads * module.head_size
    norm = _norm_size(module)
    bias = 0 if module.gated else 1
    if part is Part.layer and (module.num_experts or module.kv_latent_size):
        without = not module.num_experts if dense is None else dense
        return _count_wide(module, tp, without) + (0.0 if without else count_expert_parameters(module, ep))
    if part is Part.layer:
        column = (h + bias) * (q + 2 * kv) + (h + bias) * f * (2 if module.gated else 1)  # split with their biases
        row = q * h + f * h  # split; their biases and the norms are replicated
        return (column + row) / tp + bias * 2 * h + 2 * norm
    if part is Part.pre:
        # A learnt position table where the module has no rotary embedding (not gated)
        embedding = module.vocab_size * h / tp + (0 if module.gated else module.tokens_per_item * h)
        return embedding + (module.input_size + 1) * h * (module.input_size > 0)
    head: float = count_projector_parameters(module)
    if module.untied_output:
        head += module.vocab_size * h / tp  # else logits share the embedding's weights (Megatron's default)
    # multi-token prediction joins the last layer's output and the next token's embedding: [2h, h], three norms
    return norm + head + module.num_mtp_layers * (2 * h * h / tp + 3 * norm)


def count_projector_parameters(module: ModuleConfig) -> float:
    """Parameters of what makes the module's output rows."""
    return float(sum((gemm.k + 1) * gemm.n for gemm in projector_gemms(module, module.tokens_per_item)))


def count_flops(module: ModuleConfig, part: Part) -> float:
    """Forward FLOPs of one part for one item, over the whole tp group. A multiply-add is 2.

    Matrix products 2*m*n*k; attention scores and values 4*s*s*h, half of it under a causal mask, less in a window
    (Narayanan et al. 2021, appendix, which counts the full square).
    """
    s, h = module.tokens_per_item, module.hidden_size
    if part is Part.layer:
        dense_frac = module.dense_frac
        linear = _flops(attention_gemms(module, s, 1)) + sum(
            frac * _flops(mlp_gemms(module, s, 1, 1, dense))
            for dense, frac in ((True, dense_frac), (False, 1 - dense_frac))
            if frac
        )
        return linear + count_attention_flops(module)
    if part is Part.pre:
        return 2.0 * s * module.input_size * h
    return _flops(head_gemms(module, s, 1))


def count_attention_flops(module: ModuleConfig) -> float:
    """Forward FLOPs of one layer's attention core for one item."""
    return 4.0 * module.tokens_per_item * module.attended_tokens * module.num_heads * mean_head_size(module)


def _flops(gemms: Iterable[Gemm]) -> float:
    return sum(2 * gemm.m * gemm.n * gemm.k * gemm.count for gemm in gemms)


def count_activation_bytes(
    module: ModuleConfig,
    part: Part,
    tp: int,
    *,
    value_bytes: int,
    fused_attention: bool,
    split: bool = False,
    dropout: bool = False,
    dense: bool | None = None,
    product_bytes: float = 0.0,
    recomputed: frozenset[Recomputed] = frozenset(),
) -> float:
    """Bytes that the forward of one part keeps for the backward, per item and rank. `split`: sequence parallelism;
    `dense` as in `count_parameters`.

    Korthikanti et al. 2022, section 4.2: s*b*h*(10 + 24/t + 5*a*s/(h*t)) for f = 4h in 2-byte values; the last term is
    the attention matrix, which a fused kernel does not keep. The 24 is 8 (Q, K, V, attention output) + 4*f/h here.
    Without dropout the matrix is kept once (2) and no masks are (of the 10, 8 are left).

    `product_bytes`: of a value that is kept as the input of a matrix product (0: as any other). Of the 8 these are
    norms' outputs, 4; of the MLP what its activation function makes. Attention keeps what it makes in 2 bytes, and the
    projection behind it its own copy if that is smaller. Parts that are `recomputed` keep what they start from.
    """
    product = (product_bytes or value_bytes) * 2 / value_bytes  # in 2-byte values
    s, h, f = module.tokens_per_item, module.hidden_size, module.ffn_hidden_size
    scale = value_bytes / 2
    if part is Part.layer:
        q = module.num_heads * module.head_size
        sparse = module.num_experts > 0 and not dense
        f_kept, routed = float(_mlp_size(module)), 0.0
        if sparse:
            f_kept = float(module.moe_top_k * f + module.shared_expert_size)
            routed = module.moe_top_k * (2.0 + product) * h  # rows that leave and enter the experts
        if module.kv_latent_size:  # expanded keys and values, and what they are expanded from
            attention = 8.0 * q + 2.0 * (module.q_latent_size + module.kv_latent_size) + 256.0 * module.num_heads
        else:
            attention = 4.0 * q + 4.0 * _kv_size(module)
        copied = product * q if product < 2 else 0.0
        made = f_kept * (0.0 if sparse and Recomputed.moe_act in recomputed else product)
        mlp = f_kept * (4.0 if module.gated else 2.0) + made + routed
        if (Recomputed.moe if sparse else Recomputed.mlp) in recomputed:
            mlp = 0.0
        divided = attention + copied + mlp
        matrix = (
            0.0
            if fused_attention or Recomputed.core_attn in recomputed
            else (5.0 if dropout else 2.0) * module.num_heads * s
        )
        masks = 2.0 if dropout else 0.0
        norms = 0.0 if Recomputed.layernorm in recomputed else 2 * product
        between = (4.0 + norms + masks) * h / (tp if split else 1)
        if Recomputed.op in recomputed:  # the layer's input, attention's output, half of what its products make
            made = 2.0 * (q + 2 * _kv_size(module)) + f_kept * (4.0 if module.gated else 2.0)
            return scale * s * ((2.0 + 2.0) * h / (tp if split else 1) + (2.0 * q + made / 2) / tp)
        return scale * s * (between + (divided + matrix) / tp)
    if part is Part.pre:
        return scale * s * 2.0 * module.input_size
    # input of the final norm and of the head
    return scale * s * 4.0 * h / (tp if split else 1) + count_logits_bytes(module, tp, value_bytes)


def count_logits_bytes(module: ModuleConfig, tp: int, value_bytes: int) -> float:
    """Logits of one item on a rank, once in training precision and once in fp32 (their softmax)."""
    logits = module.vocab_size * (1 + module.num_mtp_layers)
    return module.tokens_per_item * logits * (value_bytes + 4.0) / tp


def module_parameters(module: ModuleConfig) -> float:
    """Parameters of the whole module."""
    count = module.num_layers + module.num_mtp_layers
    dense = module.num_dense_layers if module.num_experts else count
    layers = dense * count_parameters(module, Part.layer, dense=True) if dense else 0.0
    if count > dense:
        layers += (count - dense) * count_parameters(module, Part.layer, dense=False)
    return layers + sum(count_parameters(module, part) for part in (Part.pre, Part.post))
