"""Constants of a GPU type, measured on the device that torch uses: `mosaic calibrate --gpu-type`.

Every constant is what makes the cost model's own formula (`cost_model/kernels.py`) give the measured seconds, so
that the factors of that formula (depth, last wave, head size) are not counted twice. They describe kernels alone. The
constants fitted to published steps also hold what a step loses between and around its kernels, so a cost model with
measured ones predicts shorter steps: it says what the kernels allow.

Not yet run on a GPU: what is tested is the arithmetic (a made-up timer) and that each kernel runs (on the CPU).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mosaic.cost_model.effects.kernels import Gemm, core_s, gemm_s, layer_work, stream_s
from megatron_mosaic.cost_model.hardware.fit import fit_line
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import GpuType
from megatron_mosaic.plan.training import Format, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Role

WARM_UPS, ROUNDS, CALLS = 3, 5, 10
SHARES = ("gemm_efficiency_frac", "bandwidth_frac", "attention_efficiency_frac")

Kernel = Callable[[], object]
Timer = Callable[[Kernel, torch.device], float]  # seconds of one call
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured. The defaults fill a GPU of today and need about 4 GB of its memory.

    `products`: (m, n, k) of bf16 matrix products. `depths`: k of products [rows, k] x [k, rows], deep enough for the
    product and not its output to take the time. `launches`: fewer than the 1024 that wait in a CUDA stream.
    """

    products: tuple[tuple[int, int, int], ...] = ((8192, 8192, 8192), (16384, 8192, 4096), (8192, 16384, 8192))
    rows: int = 8192
    depths: tuple[int, ...] = (512, 768, 1024, 1536, 2048, 4096, 8192)
    copied_bytes: int = 1 << 30
    sequences: int = 4
    tokens: int = 4096
    heads: int = 32
    head_size: int = 128
    launches: int = 500


def time_kernel(kernel: Kernel, device: torch.device) -> float:
    """Median seconds of a call on the device, launches hidden behind the calls before."""
    for _ in range(WARM_UPS):
        kernel()
    return statistics.median(_time_calls(kernel, device) / CALLS for _ in range(ROUNDS))


def _time_calls(kernel: Kernel, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(CALLS):
            kernel()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        kernel()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # milliseconds


def measure_constants(
    base: GpuType,
    device: torch.device,
    sizes: Sizes = Sizes(),
    *,
    timer: Timer = time_kernel,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Fitted constants of `GpuType` -> their values on this device, by the datasheet of `base`.

    Shares of the datasheet's rates, `half_depth` in elements, `launch_s` in seconds. ConfigError where the device is
    faster than the datasheet says: it is not of this type.
    """
    found: dict[str, float] = {}
    progress("matrix products")
    found["half_depth"] = measure_half_depth(device, sizes.rows, sizes.depths, timer)
    found["gemm_efficiency_frac"] = measure_gemm_efficiency(base, device, sizes.products, found["half_depth"], timer)
    progress("memory")
    found["bandwidth_frac"] = measure_bandwidth(base, device, sizes.copied_bytes, timer)
    progress("attention")
    found["attention_efficiency_frac"] = measure_attention_efficiency(base, device, sizes, timer)
    progress("launches")
    found["launch_s"] = measure_launch_s(device, sizes.launches, clock)
    for name in SHARES:
        if found[name] > 1:
            raise ConfigError(
                f"mosaic calibrate --gpu-type {base.name}: {name}",
                got=f"{found[name]:.3g}, above the datasheet of {base.name}, on {device_name(device)}",
                expected="at most 1",
                fix="name the GPU type that the device is",
            )
    return found


def measure_half_depth(device: torch.device, rows: int, depths: Sequence[int], timer: Timer) -> float:
    """Elements of k at which a product reaches half its efficiency; at least 1, that of ideal hardware.

    Efficiency k / (k + h) means seconds in proportion to k + h at equal m and n: h is where the line through the
    points reaches zero. ConfigError when the seconds do not grow with k.
    """
    points = [(float(k), timer(_product(device, rows, rows, k), device)) for k in depths]
    line = fit_line("half_depth", points)
    if not line.slope_s > 0:
        raise ConfigError(
            "half_depth",
            got=f"seconds that do not grow with depth: {[f'{k:g}: {s:.3g}' for k, s in points]}",
            expected="deeper products to take longer",
            fix="calibrate while nothing else runs on the device",
        )
    return max(1.0, line.intercept_s / line.slope_s)


def measure_gemm_efficiency(
    base: GpuType,
    device: torch.device,
    products: Sequence[tuple[int, int, int]],
    half_depth: float,
    timer: Timer,
) -> float:
    """Share of the bf16 peak of `base` that the best of the (m, n, k) reaches, beyond its depth and its last wave."""
    ideal = replace(base, gemm_efficiency_frac=1.0, half_depth=half_depth, bandwidth_frac=math.inf)
    shares = []
    for m, n, k in products:
        seconds = timer(_product(device, m, n, k), device)
        shares.append(gemm_s(ideal, Gemm(m, n, k), base.num_sms, Format.bf16) / seconds)
    return max(shares)


def measure_bandwidth(base: GpuType, device: torch.device, copied_bytes: int, timer: Timer) -> float:
    """Share of the memory bandwidth of `base` that a copy reaches; each byte is read and written."""
    source = torch.ones(copied_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = timer(lambda: target.copy_(source), device)
    return stream_s(replace(base, bandwidth_frac=1.0), 2.0 * copied_bytes, base.num_sms) / seconds


def measure_attention_efficiency(base: GpuType, device: torch.device, sizes: Sizes, timer: Timer) -> float:
    """Share of the bf16 peak of `base` that torch's fused causal attention reaches in its forward.

    FLOPs are the cost model's: those of the lower triangle, times (size + 24) / size.
    """
    shape = (sizes.sequences, sizes.heads, sizes.tokens, sizes.head_size)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    with torch.inference_mode():
        seconds = timer(lambda: scaled_dot_product_attention(query, key, value, is_causal=True), device)
    module = ModuleConfig(
        name="attention",
        role=Role.backbone,
        num_layers=1,
        hidden_size=sizes.heads * sizes.head_size,
        num_heads=sizes.heads,
        ffn_hidden_size=1,
        tokens_per_item=sizes.tokens,
        causal=True,
    )
    setup = TrainingSetup(fused_attention=True)
    work = layer_work(module, sizes.sequences, tp=1, cp=1, ep=1, split=False, dense=True, setup=setup)
    return core_s(replace(base, attention_efficiency_frac=1.0), work, base.num_sms) / seconds


def measure_launch_s(device: torch.device, launches: int, clock: Clock = time.perf_counter) -> float:
    """Seconds of the host to launch an elementwise kernel on one element, while the device works asynchronously."""
    tensor = torch.zeros(1, device=device)
    seconds = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        started = clock()
        for _ in range(launches):
            tensor.add_(1.0)
        seconds.append((clock() - started) / launches)
        _wait(device)
    return statistics.median(seconds[1:])


def current_device() -> torch.device:
    """The GPU that torch uses now. ConfigError without one."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "mosaic calibrate --gpu-type",
            got="no GPU that torch can use",
            expected="a GPU of that type",
            fix="run it on the GPU machine; without --gpu-type, this machine's CPU is measured",
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """What the driver calls it; `cpu` without one."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def describe_source(device: torch.device) -> str:
    """The source of a measured constant: date, device, version."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"measured {date} by mosaic calibrate on {device_name(device)}, torch {torch.__version__}"


def _product(device: torch.device, m: int, n: int, k: int) -> Kernel:
    """A bf16 product. Random values: zeros cost less power, so that the clock is higher than in training."""
    a = torch.randn(m, k, device=device).to(torch.bfloat16)
    b = torch.randn(k, n, device=device).to(torch.bfloat16)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    return lambda: torch.mm(a, b, out=out)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
