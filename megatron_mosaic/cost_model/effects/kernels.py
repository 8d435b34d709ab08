"""Kernels of one part of a module on one rank, and how long each of them takes on a GPU type.

A matrix product of m x k and k x n takes max(2mnk / (peak x efficiency), bytes / bandwidth). Its efficiency is
the GPU's fitted plateau x k / (k + half_depth) x the share of busy SMs in the last wave, for the best of the tile
sizes that libraries offer. Everything else is moved bytes. A part is never faster than its launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import GpuType
from megatron_mosaic.plan.training import Dispatcher, Format, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig

# (rows, columns) of an output tile, efficiency relative to the largest (CUTLASS profiler, shapes of 8192^3)
_TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.82), (64, 64, 0.65))
# A fused attention kernel reaches size / (size + 24) of its efficiency: heads of 64 channels 0.86 of what heads of 128
# do, between the 0.81 and 0.92 of Dao 2023 (FlashAttention-2), figures 4 and 5
_HEAD_LOSS = 24
_LAYER_LAUNCHES, _MIXTURE_LAUNCHES = 20.0, 24.0  # kernels of a layer's forward, and what a mixture of experts adds
BACKWARD_LAUNCHES = 1.7  # kernels of a backward for each of its forward
_SHARPNESS = 4.0  # of the turn from launches to kernels; chosen for the regret of vtrain_single_node_a100
_GRAPH_LAUNCH_S = 1e-6  # of a kernel inside a CUDA graph, which the device launches itself; assumed, no source
_ROPE_CHANNELS = 64  # of the decoupled key of latent attention (DeepSeek-V2, table 1; V3 keeps it)


@dataclass(frozen=True, slots=True)
class Gemm:
    """A product [m, k] x [k, n], `count` times in one launch. `weights`: [k, n] is trained, so it has a gradient."""

    m: float
    n: float
    k: float
    count: float = 1
    weights: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """Kernels of a part in its forward pass. `core`: attention, which selective recomputation repeats; so it may an
    MLP's products and activation function, and norms (their bytes are in `moved_bytes`)."""

    gemms: tuple[Gemm, ...]
    moved_bytes: float
    launches: float
    core_flops: float = 0.0
    core_bytes: float = 0.0
    core_gemms: tuple[Gemm, ...] = ()
    mlp_gemms: tuple[Gemm, ...] = ()  # those of `gemms` that are the MLP's
    activation_bytes: float = 0.0
    norm_bytes: float = 0.0


def attention_gemms(module: ModuleConfig, tokens: float, tp: int) -> tuple[Gemm, ...]:
    """Projections around the attention core."""
    h, heads, size = module.hidden_size, module.num_heads / tp, module.head_size
    if module.kv_latent_size:
        latent = module.kv_latent_size
        query = (
            (Gemm(tokens, module.q_latent_size, h), Gemm(tokens, heads * (size + _ROPE_CHANNELS), module.q_latent_size))
            if module.q_latent_size
            else (Gemm(tokens, heads * (size + _ROPE_CHANNELS), h),)
        )
        keys = (Gemm(tokens, latent + _ROPE_CHANNELS, h), Gemm(tokens, 2 * heads * size, latent))
        return (*query, *keys, Gemm(tokens, h, heads * size))
    kv = 2 * size * module.query_groups / tp
    return (Gemm(tokens, heads * size + kv, h), Gemm(tokens, h, heads * size))


def projector_gemms(module: ModuleConfig, tokens: float) -> tuple[Gemm, ...]:
    """Products that make the rows that leave a module: one, or two with an activation function between."""
    if not module.output_size:
        return ()
    rows, width = tokens / module.merge_tokens, module.merge_tokens * module.hidden_size
    if not module.projector_size:
        return (Gemm(rows, module.output_size, width),)
    return Gemm(rows, module.projector_size, width), Gemm(rows, module.output_size, module.projector_size)


def head_gemms(module: ModuleConfig, tokens: float, tp: int) -> tuple[Gemm, ...]:
    """Products behind the last layer: logits, those of multi-token prediction with what joins its two inputs, rows."""
    h = module.hidden_size
    logits = (Gemm(tokens, module.vocab_size / tp, h),) * (1 + module.num_mtp_layers) if module.vocab_size else ()
    joined = (Gemm(tokens, h / tp, 2 * h),) * module.num_mtp_layers
    return (*logits, *joined, *projector_gemms(module, tokens))


def mean_head_size(module: ModuleConfig) -> float:
    """Channels of a head, mean of keys and values: latent attention gives keys a rotary part of their own."""
    return module.head_size + (_ROPE_CHANNELS / 2 if module.kv_latent_size else 0)


def mlp_gemms(module: ModuleConfig, tokens: float, tp: int, ep: int, dense: bool, etp: int = 1) -> tuple[Gemm, ...]:
    """Products of an MLP; of a mixture of experts, those of the experts of one rank at even routing. `etp`: ranks that
    share an expert, and gather their tokens for it."""
    h, wide = module.hidden_size, 2 if module.gated else 1
    if dense:
        f = (module.dense_ffn_size if module.num_experts else module.ffn_hidden_size) / tp
        return Gemm(tokens, wide * f, h), Gemm(tokens, h, f)
    f, local = module.ffn_hidden_size / etp, module.num_experts / ep
    rows = tokens / tp * etp * module.moe_top_k * ep / module.num_experts
    gemms = (Gemm(tokens / tp, module.num_experts, h), Gemm(rows, wide * f, h, local), Gemm(rows, h, f, local))
    shared = module.shared_expert_size / tp
    return (*gemms, Gemm(tokens, wide * shared, h), Gemm(tokens, h, shared)) if shared else gemms


def _routed_bytes(module: ModuleConfig, ep: int, setup: TrainingSetup) -> int:
    """Moved for each value of a copy of a token: permute and unpermute read and write it, and it is weighted. Where a
    rank has several experts, copies come from an all-to-all by sender: they are sorted by expert, and back again
    (Megatron's MoEAlltoAllTokenDispatcher). DeepEP brings each token once and needs no second sorting."""
    sorted_again = setup.expert_dispatcher is Dispatcher.alltoall and module.num_experts > ep
    return 12 + (8 if sorted_again else 0)


@lru_cache(maxsize=65536)
def layer_work(
    module: ModuleConfig,
    items: int,
    tp: int,
    cp: int,
    ep: int,
    split: bool,
    dense: bool,
    setup: TrainingSetup,
    etp: int = 1,
) -> Work:
    """One layer on one rank. `split`: sequence parallelism divides what stands between the matrix products."""
    s = module.tokens_per_item / cp
    tokens, h, heads = items * s, module.hidden_size, module.num_heads / tp
    size = mean_head_size(module)
    mlp = mlp_gemms(module, tokens, tp, ep, dense, etp)
    gemms = attention_gemms(module, tokens, tp) + mlp
    # 2-byte values: two norms read and write, two residual additions read two and write one (and a mask)
    between = tokens * h * (2 * 4 + 2 * (7 if setup.dropout else 6)) / (tp if split else 1)
    active = module.ffn_hidden_size * module.moe_top_k / tp if not dense else 0.0
    f = (
        (active + module.shared_expert_size / tp)
        if not dense
        else (module.dense_ffn_size or module.ffn_hidden_size) / tp
    )
    activation = tokens * f * (6 if module.gated else 4)
    rotary = 4 * tokens * (heads + module.query_groups / tp) * size if module.gated else 0.0
    routed = 0.0 if dense else _routed_bytes(module, ep, setup) * tokens / tp * module.moe_top_k * h
    low = sum(3 * g.m * g.k * g.count for g in gemms) if setup.format.is_low else 0.0  # reads 2 bytes, writes 1
    flops = 4 * items * s * module.attended_tokens * heads * (size + _HEAD_LOSS)
    moved = between + activation + rotary + routed + low
    # router, sorting and exchange, then two products for every expert of the rank
    launches = _LAYER_LAUNCHES + (0.0 if dense else _MIXTURE_LAUNCHES + 2 * module.num_experts / ep)
    found = Work(
        gemms,
        moved,
        launches,
        flops,
        mlp_gemms=mlp,
        activation_bytes=activation,
        norm_bytes=8 * tokens * h / (tp if split else 1),
    )
    if setup.fused_attention:
        return found
    pairs = items * heads * s * module.tokens_per_item
    products = (
        Gemm(s, module.tokens_per_item, size, items * heads, False),
        Gemm(s, size, module.tokens_per_item, items * heads, False),
    )
    return replace(
        found,
        launches=launches + 8,
        core_flops=0.0,
        core_bytes=pairs * (4 + (5 if setup.dropout else 0)),
        core_gemms=products,
    )


def forward_bytes(work: Work) -> float:
    """What a part's forward reads and writes, of 2-byte values."""
    return work.moved_bytes + work.core_bytes + _product_bytes((*work.gemms, *work.core_gemms))


def backward_bytes(work: Work, *, trained: bool) -> float:
    """And its backward: see `backward_s`."""
    weights = sum(8 * g.k * g.n * g.count + 2 * (g.m * g.k + g.m * g.n) * g.count for g in work.gemms) * trained
    return 1.5 * (work.moved_bytes + work.core_bytes) + _product_bytes((*work.gemms, *2 * work.core_gemms)) + weights


def _product_bytes(gemms: Iterable[Gemm]) -> float:
    return 2 * sum((g.m * g.k + g.k * g.n + g.m * g.n) * g.count for g in gemms)


@lru_cache(maxsize=65536)
def gemm_s(gpu: GpuType, gemm: Gemm, num_sms: int, setup_format: Format, output_bytes: int = 2) -> float:
    """Seconds of a product on `num_sms` of the GPU's SMs. `output_bytes`: 8 when it adds to fp32."""
    m, n, count = max(gemm.m, 1.0), max(gemm.n, 1.0), gemm.count
    best = 0.0
    for rows, columns, relative in _TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * max(1.0, count)
        used = (m * n * max(1.0, count)) / (tiles * rows * columns)
        best = max(best, relative * used * tiles / (num_sms * math.ceil(tiles / num_sms)))
    low = setup_format.is_low and gemm.weights
    peak = flops_per_s(gpu, setup_format if low else Format.bf16) * num_sms / gpu.num_sms
    efficiency = gpu.gemm_efficiency_frac * best * gemm.k / (gemm.k + gpu.half_depth * (2 if low else 1))
    efficiency *= gpu.low_precision_frac if low else 1.0
    width = 1 if low else 2
    num_bytes = count * (width * (gemm.m * gemm.k + gemm.k * gemm.n) + output_bytes * gemm.m * gemm.n)
    return max(2 * gemm.m * gemm.n * gemm.k * count / (peak * efficiency), stream_s(gpu, num_bytes, num_sms))


def flops_per_s(gpu: GpuType, number_format: Format) -> float:
    """Peak of the format. ConfigError where the GPU has none, or none is known."""
    if number_format is Format.fp32:
        raise ConfigError(
            f"GPU type {gpu.name!r}: {number_format}",
            got="no source for the peak of fp32 matrix products, with TF32 or without",
            expected="a format whose peak the GPU's datasheet was read for",
            fix="set workload.training.format=bf16",
        )
    peaks = {Format.fp8: gpu.fp8_flops_per_s, Format.mxfp8: gpu.fp8_flops_per_s, Format.nvfp4: gpu.fp4_flops_per_s}
    peak = peaks.get(number_format, gpu.flops_per_s)
    if not peak:
        raise ConfigError(
            f"GPU type {gpu.name!r}: {number_format}",
            got="no matrix products in this format",
            expected="a format that the GPU computes in",
            fix="use bf16",
        )
    return peak


def stream_s(gpu: GpuType, num_bytes: float, num_sms: int) -> float:
    """Seconds to move bytes. Half of the SMs saturate the memory, fewer do so in proportion."""
    reach = min(1.0, 2 * num_sms / gpu.num_sms)
    return num_bytes / (gpu.memory_bytes_per_s * gpu.bandwidth_frac * reach)


def core_s(gpu: GpuType, work: Work, num_sms: int) -> float:
    """Seconds of the attention core's forward."""
    fused = work.core_flops / (gpu.flops_per_s * gpu.attention_efficiency_frac * num_sms / gpu.num_sms)
    products = sum(gemm_s(gpu, gemm, num_sms, Format.bf16) for gemm in work.core_gemms)
    return fused + products + stream_s(gpu, work.core_bytes, num_sms)


def forward_s(gpu: GpuType, work: Work, num_sms: int, setup: TrainingSetup, comm_s: float = 0.0) -> float:
    """Seconds of a part's forward with `comm_s` of its collectives, and the host's launches."""
    products = sum(gemm_s(gpu, gemm, num_sms, setup.format) for gemm in work.gemms)
    busy = products + stream_s(gpu, work.moved_bytes, num_sms) + core_s(gpu, work, num_sms)
    return _beside(busy + comm_s, launches_s(gpu, work, setup))


def _beside(device_s: float, host_s: float) -> float:
    """The device's work and the host's launches at the same time: the longer of the two, and more where both are about
    as long. Then the device waits before short kernels for what the host has not launched yet, and the host has no lead
    from long ones left: each stretch takes its own maximum."""
    longer, shorter = max(device_s, host_s), min(device_s, host_s)
    return longer * (1 + (shorter / longer) ** _SHARPNESS) ** (1 / _SHARPNESS) if longer else 0.0


def launches_s(gpu: GpuType, work: Work, setup: TrainingSetup) -> float:
    """Seconds of the host to launch a part's forward."""
    return work.launches * (min(gpu.launch_s, _GRAPH_LAUNCH_S) if setup.cuda_graphs else gpu.launch_s)


def backward_s(
    gpu: GpuType, work: Work, num_sms: int, setup: TrainingSetup, *, trained: bool, comm_s: float = 0.0
) -> float:
    """Seconds of a part's backward: gradients of inputs, and of weights where they are trained.

    A fused core recomputes its scores: five products for the forward's two (Dao 2023, section 3.1).
    """
    busy = stream_s(gpu, 1.5 * work.moved_bytes, num_sms)
    for g in work.gemms:
        busy += gemm_s(gpu, Gemm(g.m, g.k, g.n, g.count), num_sms, setup.format)
        if trained:
            busy += gemm_s(gpu, Gemm(g.k, g.n, g.m, g.count), num_sms, setup.format, 8)
    core = 2.5 * work.core_flops / (gpu.flops_per_s * gpu.attention_efficiency_frac * num_sms / gpu.num_sms)
    core += 2 * sum(gemm_s(gpu, gemm, num_sms, Format.bf16) for gemm in work.core_gemms)
    busy += core + stream_s(gpu, 1.5 * work.core_bytes, num_sms)
    return _beside(busy + comm_s, BACKWARD_LAUNCHES * launches_s(gpu, work, setup))
