"""What a module weighs: parameters, FLOPs, activation bytes of its parts. Closed forms, no hardware.

Shapes follow Megatron's layer: QKV [h, h + 2 kv], projection [h, h], MLP [h, f] (twice when gated) and [f, h].
A gated module is taken to be LLaMA-like (RMSNorm, no biases), any other GPT-like (LayerNorm, biases).
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mosaic.cost_model.effects.kernels import Gemm, attention_gemms, mean_head_size, mlp_gemms
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.plan.workload import ModuleConfig


def _kv_size(module: ModuleConfig) -> int:
    return module.head_size * module.query_groups


def _norm_size(module: ModuleConfig) -> int:
    """Parameters of one norm: RMSNorm has weights only."""
    return module.hidden_size if module.gated else 2 * module.hidden_size


def count_expert_parameters(module: ModuleConfig, ep: int, etp: int = 1) -> float:
    """Parameters of the routed experts of one layer on one rank, at the mean over dense and sparse layers."""
    wide = 3 if module.gated else 2
    return (
        (1 - module.dense_frac) * module.num_experts / (ep * etp) * wide * module.hidden_size * module.ffn_hidden_size
    )


def _count_wide(module: ModuleConfig, tp: int) -> float:
    """Parameters on one rank of a layer with experts (without the routed ones, at the mean over its layers), or with
    latent attention."""
    h, wide, latent = module.hidden_size, 3 if module.gated else 2, module.kv_latent_size
    heads, size = module.num_heads, module.head_size
    if latent:
        query = module.q_latent_size or h
        attention = query * heads * (size + 64) + 2 * latent * heads * size + h * heads * size
        whole = h * (latent + 64) + (h * query if module.q_latent_size else 0)
    else:
        attention, whole = h * (2 * heads * size + 2 * _kv_size(module)), 0
    dense_frac = module.dense_frac
    dense_size = module.dense_ffn_size if module.num_experts else module.ffn_hidden_size
    mlp = dense_frac * dense_size + (1 - dense_frac) * module.shared_expert_size
    return (
        (attention + wide * h * mlp) / tp + whole + (1 - dense_frac) * h * module.num_experts + 2 * _norm_size(module)
    )


def count_parameters(module: ModuleConfig, part: Part, tp: int = 1, ep: int = 1) -> float:
    """Parameters of one part (for `layer`: of one layer) on one rank of a tp group."""
    h, f, kv = module.hidden_size, module.ffn_hidden_size, _kv_size(module)
    q = module.num_heads * module.head_size
    norm = _norm_size(module)
    bias = 0 if module.gated else 1
    if part is Part.layer and (module.num_experts or module.kv_latent_size):
        return _count_wide(module, tp) + count_expert_parameters(module, ep)
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
        head += module.vocab_size * h / tp
    return norm + head  # else logits share the embedding's weights (Megatron's default)


def count_projector_parameters(module: ModuleConfig) -> float:
    """Parameters of what makes the module's output rows."""
    return (module.hidden_size + 1.0) * module.output_size * (module.output_size > 0)


def count_flops(module: ModuleConfig, part: Part) -> float:
    """Forward FLOPs of one part for one item, over the whole tp group. A multiply-add is 2.

    Matrix products 2*m*n*k; attention scores and values 4*s*s*h, half of it under a causal mask
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
    return 2.0 * s * h * (module.vocab_size + module.output_size)


def count_attention_flops(module: ModuleConfig) -> float:
    """Forward FLOPs of one layer's attention core for one item."""
    square = 4.0 * module.tokens_per_item**2 * module.num_heads * mean_head_size(module)
    return square * (0.5 if module.causal else 1.0)


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
) -> float:
    """Bytes that the forward of one part keeps for the backward, per item and rank. `split`: sequence parallelism.

    Korthikanti et al. 2022, section 4.2: s*b*h*(10 + 24/t + 5*a*s/(h*t)) for f = 4h in 2-byte values; the last term is
    the attention matrix, which a fused kernel does not keep. The 24 is 8 (Q, K, V, attention output) + 4*f/h here.
    Without dropout the matrix is kept once (2) and no masks are (of the 10, 8 are left).
    """
    s, h, f = module.tokens_per_item, module.hidden_size, module.ffn_hidden_size
    scale = value_bytes / 2
    if part is Part.layer:
        q = module.num_heads * module.head_size
        f_kept = float(f)
        routed = 0.0
        if module.num_experts:
            dense_frac = module.dense_frac
            active = module.moe_top_k * f + module.shared_expert_size
            f_kept = dense_frac * module.dense_ffn_size + (1 - dense_frac) * active
            routed = (1 - dense_frac) * module.moe_top_k * 4.0 * h  # rows that enter and leave the experts
        if module.kv_latent_size:  # expanded keys and values, and what they are expanded from
            attention = 8.0 * q + 2.0 * (module.q_latent_size + module.kv_latent_size) + 256.0 * module.num_heads
        else:
            attention = 4.0 * q + 4.0 * _kv_size(module)
        divided = attention + 2.0 * f_kept * (3 if module.gated else 2) + routed
        matrix = 0.0 if fused_attention else (5.0 if dropout else 2.0) * module.num_heads * s
        masks = 2.0 if dropout else 0.0
        between = (8.0 + masks) * h / (tp if split else 1)
        return scale * s * (between + (divided + matrix) / tp)
    if part is Part.pre:
        return scale * s * 2.0 * module.input_size
    # input of the final norm and of the head
    return scale * s * 4.0 * h / (tp if split else 1) + count_logits_bytes(module, tp, value_bytes)


def count_logits_bytes(module: ModuleConfig, tp: int, value_bytes: int) -> float:
    """Logits of one item on a rank, once in training precision and once in fp32 (their softmax)."""
    return module.tokens_per_item * module.vocab_size * (value_bytes + 4.0) / tp


def module_parameters(module: ModuleConfig) -> float:
    """Parameters of the whole module."""
    return module.num_layers * count_parameters(module, Part.layer) + sum(
        count_parameters(module, part) for part in (Part.pre, Part.post)
    )
