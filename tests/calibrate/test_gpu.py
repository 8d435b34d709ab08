"""Constants of a GPU type from measurements: a made-up timer gives closed forms, the CPU runs every kernel once.

The strongest oracle is the cost model itself: a timer that answers with the seconds it predicts for a GPU type must
lead back to that type's constants, through a file too.
"""

import json
import math
from dataclasses import replace
from itertools import count

import pytest
import torch

from megatron_mosaic.calibrate import gpu as measure_gpu
from megatron_mosaic.calibrate.gpu import (
    ROUNDS,
    Sizes,
    current_device,
    describe_source,
    measure_attention_efficiency,
    measure_bandwidth,
    measure_constants,
    measure_gemm_efficiency,
    measure_half_depth,
    measure_launch_s,
    time_kernel,
)
from megatron_mosaic.cli.main import main
from megatron_mosaic.cost_model.effects.kernels import Gemm, gemm_s, stream_s
from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type
from megatron_mosaic.cost_model.hardware.gpu_type_file import format_gpu_type_file
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.training import Format

CPU = torch.device("cpu")
BASE = load_gpu_type("h100_sxm")
TINY = Sizes(
    products=((64, 32, 16), (32, 32, 32)),
    rows=32,
    depths=(64, 4096),  # far apart, so that the second takes longer whatever else the machine does
    copied_bytes=4096,
    sequences=2,
    tokens=16,
    heads=2,
    head_size=128,
    launches=5,
)
MEASURED = ("half_depth", "gemm_efficiency_frac", "bandwidth_frac", "attention_efficiency_frac", "launch_s")


def answers(*seconds):
    """A timer that runs each kernel and answers with the next of these seconds."""
    left = iter(seconds)

    def timer(kernel, device):
        kernel()
        return next(left)

    return timer


def test_every_kernel_runs_on_the_cpu():
    said = []
    found = measure_constants(BASE, CPU, TINY, progress=said.append)
    assert tuple(found) == MEASURED
    assert all(value > 0 and math.isfinite(value) for value in found.values())
    assert len(said) == 4


def test_bandwidth_is_two_bytes_moved_for_each_copied():
    share = measure_bandwidth(BASE, CPU, 1000, answers(1e-6))
    assert share == pytest.approx(2 * 1000 / 1e-6 / BASE.memory_bytes_per_s)


@pytest.mark.parametrize("half_depth", [50.0, 210.0, 2000.0])
def test_half_depth_is_where_the_line_reaches_zero(half_depth):
    depths = (64, 128, 256)
    timer = answers(*(1e-9 * (k + half_depth) for k in depths))
    assert measure_half_depth(CPU, 8, depths, timer) == pytest.approx(half_depth)


def test_half_depth_of_ideal_hardware_is_one():
    assert measure_half_depth(CPU, 8, (8, 16), answers(8e-9, 16e-9)) == 1.0


def test_half_depth_refuses_noise():
    with pytest.raises(ConfigError, match="do not grow with depth"):
        measure_half_depth(CPU, 8, (8, 16), answers(2e-9, 1e-9))


def test_gemm_efficiency_is_the_best_share_of_the_peak():
    # 12 x 11 tiles of 256 x 128 on 132 SMs: one full wave, no tile cut, so nothing but depth is lost
    m, n, k = 12 * 256, 11 * 128, 16
    ideal_s = 2 * m * n * k / BASE.flops_per_s
    timer = answers(ideal_s / 0.5, ideal_s / 0.6)
    assert measure_gemm_efficiency(BASE, CPU, ((m, n, k), (m, n, k)), 1e-12, timer) == pytest.approx(0.6)
    # of a depth at which half is lost, half the share means all of it
    assert measure_gemm_efficiency(BASE, CPU, ((m, n, k),), 16.0, answers(ideal_s / 0.4)) == pytest.approx(0.8)


def test_attention_counts_the_lower_triangle_and_small_heads():
    sizes = replace(TINY, sequences=3, tokens=32, heads=5, head_size=128)
    flops = 4 * 3 * 5 * 32 * 32 * 128 / 2  # two products of 2 s s d each, half of them masked
    share = measure_attention_efficiency(BASE, CPU, sizes, answers(1e-6))
    assert share == pytest.approx(flops * (128 + 24) / 128 / 1e-6 / BASE.flops_per_s)


def test_launch_is_host_time_over_launches():
    ticks = count()
    assert measure_launch_s(CPU, 4, lambda: 0.1 * next(ticks)) == pytest.approx(0.1 / 4)
    assert next(ticks) == 2 * (ROUNDS + 1)


def test_seconds_of_the_cost_model_lead_back_to_its_constants(tmp_path):
    true = replace(load_gpu_type("b200_sxm"), half_depth=321.0, bandwidth_frac=0.9, attention_efficiency_frac=0.55)
    true = replace(true, gemm_efficiency_frac=0.77)
    sizes = replace(TINY, products=((512, 512, 2048),), rows=512, depths=(2048, 4096, 8192), copied_bytes=1 << 20)
    gemms = [Gemm(512, 512, k) for k in (*sizes.depths, 2048)]
    attention_s = 4 * 2 * 2 * 16 * 16 * (128 + 24) / 2 / (true.flops_per_s * 0.55)
    timer = answers(
        *(gemm_s(true, gemm, true.num_sms, Format.bf16) for gemm in gemms),
        stream_s(true, 2 << 20, true.num_sms),
        attention_s,
    )
    ticks = count()
    found = measure_constants(load_gpu_type("b200_sxm"), CPU, sizes, timer=timer, clock=lambda: 5 * 4e-6 * next(ticks))
    assert found == {key: pytest.approx(4e-6 if key == "launch_s" else getattr(true, key)) for key in MEASURED}

    path = tmp_path / "mine.yaml"
    path.write_text(format_gpu_type_file("b200_sxm", found, describe_source(CPU)))
    gpu = load_gpu_type(str(path))
    assert gpu == replace(
        true, name="mine.yaml", launch_s=4e-6, sources=true.sources | dict.fromkeys(MEASURED, describe_source(CPU))
    )


def test_a_device_faster_than_its_datasheet_is_another_one():
    timer = answers(1.0, 2.0, 1.0, 1.0, 1e-15, 1.0)
    with pytest.raises(ConfigError, match="h100_sxm: bandwidth_frac") as caught:
        measure_constants(BASE, CPU, TINY, timer=timer)
    assert caught.value.fix == "name the GPU type that the device is"


def test_time_kernel_is_per_call():
    calls = []
    assert 0 < time_kernel(lambda: calls.append(1), CPU) < 1
    assert len(calls) == measure_gpu.WARM_UPS + ROUNDS * measure_gpu.CALLS


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 50.0  # milliseconds, of all calls between the two

    order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert time_kernel(lambda: order.append("call"), torch.device("cuda")) == pytest.approx(0.05 / measure_gpu.CALLS)
    calls = ["call"] * measure_gpu.CALLS
    assert order == ["call"] * measure_gpu.WARM_UPS + ["record", *calls, "record", "synchronize"] * ROUNDS


def test_source_names_date_device_and_version():
    text = describe_source(CPU)
    assert text.startswith("measured 20")
    assert text.endswith(f" by mosaic calibrate on cpu, torch {torch.__version__}")


def test_the_command_writes_what_cluster_gpu_reads(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_gpu, "current_device", lambda: CPU)
    monkeypatch.setattr(
        measure_gpu, "measure_constants", lambda base, device, **_: measure_constants(base, device, TINY)
    )
    assert main(["calibrate", "--gpu-type", "h100_sxm", "--out", "mine.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert set(result) == {"gpu_type", "constants", "seconds"}
    gpu = load_gpu_type(result["gpu_type"])
    for name in MEASURED:
        assert getattr(gpu, name) == pytest.approx(result["constants"][name], rel=1e-4)
        assert gpu.sources[name] == describe_source(CPU)
    assert gpu.network_frac == BASE.network_frac
    assert main(["calibrate", "--gpu-type", "h100_sxm", "--out", "mine.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "cluster.gpu=mine.yaml" in out
    assert "kernels alone" in err
    assert main(["plan", "model=vlm_7b", "cluster=h100_1x8", "cluster.gpu=mine.yaml", "search.max_tp=1"]) in (0, 1)
    assert "mine.yaml" in "".join(capsys.readouterr())


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU that torch can use"):
        current_device()
    out = tmp_path / "mine.yaml"
    assert main(["calibrate", "--gpu-type", "h100_sxm", "--out", str(out), "--json"]) == 2
    text, err = capsys.readouterr()
    assert json.loads(text)["expected"] == "a GPU of that type"
    assert "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--gpu-type", "v100", "--out", "x.yaml"], "--gpu-type"),
        (["--gpu-type", "", "--out", "x.yaml"], "--gpu-type"),
        (["--gpu-type", "h100_sxm"], "--out"),
        (["--gpu-type", "h100_sxm", "--out", "x.json"], "--out"),
        (["--gpu-type", "h100_sxm", "--out", "x.yaml", "cluster=local"], "override 'cluster=local'"),
    ],
)
def test_the_command_refuses(capsys, monkeypatch, words, where):
    monkeypatch.setattr(measure_gpu, "current_device", lambda: pytest.fail("measured"))
    assert main(["calibrate", *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["where"] == where


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_within_what_hardware_allows():
    # the bounds of the fit, wider where a kernel alone may be better than a whole step
    base = replace(BASE, flops_per_s=1e16, memory_bytes_per_s=2e13)  # above any GPU: its shares are low, never refused
    found = measure_constants(base, current_device())
    assert all(0 < found[name] < 1 for name in measure_gpu.SHARES)
    assert 1 <= found["half_depth"] < 4096
    assert 1e-7 < found["launch_s"] < 1e-3
