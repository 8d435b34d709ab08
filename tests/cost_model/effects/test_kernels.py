"""Kernels and steps against closed forms, and that more of a resource is never slower."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.compute import AnalyticCompute
from megatron_mosaic.cost_model.effects.counts import module_parameters
from megatron_mosaic.cost_model.effects.kernels import Gemm, Work, forward_s, gemm_s, layer_work, stream_s
from megatron_mosaic.cost_model.effects.parameters import shards_of
from megatron_mosaic.cost_model.hardware.catalogue import gpu_type_names, load_gpu_type
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.constants import BOUNDS
from megatron_mosaic.cost_model.published.prediction import estimate_case
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.training import Dispatcher, Format, TrainingSetup
from tests.cases import LLM, VISION

IDEAL = replace(
    load_gpu_type("a100_sxm_80gb"), gemm_efficiency_frac=1.0, half_depth=1e-9, bandwidth_frac=1.0, num_sms=128
)
ROWS = {row["row_id"]: row for row in load_rows(PUBLISHED / "korthikanti2022_table5.csv")}
ROW = ROWS["korthikanti2022_table5-0003"]


def _case(**changes: str) -> Case:
    case = try_case(ROW | changes)
    assert isinstance(case, Case), case
    return case


def test_a_large_product_takes_its_flops_at_peak():
    # 128 tiles of 256 x 128 fill 128 SMs exactly: no tile or wave is wasted
    m, n, k = 256 * 16, 128 * 8, 65536
    assert gemm_s(IDEAL, Gemm(m, n, k), 128, Format.bf16) == pytest.approx(2 * m * n * k / 312e12)


def test_one_tile_too_many_is_another_wave():
    full = gemm_s(IDEAL, Gemm(256 * 16, 128 * 8, 65536), 128, Format.bf16)
    assert gemm_s(IDEAL, Gemm(256 * 16, 128 * 8 + 1, 65536), 128, Format.bf16) > 1.02 * full


def test_a_thin_product_takes_its_bytes():
    assert gemm_s(IDEAL, Gemm(1, 8192, 8192), 128, Format.bf16) >= 2 * 8192 * 8192 / 2.039e12


@given(st.integers(1, 128), st.integers(1, 128))
def test_more_sms_never_move_bytes_slower(a, b):
    low, high = sorted((a, b))
    assert stream_s(IDEAL, 1e9, low) >= stream_s(IDEAL, 1e9, high)


@pytest.mark.parametrize("name", gpu_type_names())
def test_every_fitted_constant_has_a_source(name):
    gpu = load_gpu_type(name)
    for key in BOUNDS:
        assert gpu.sources[key]


def test_a_gpu_without_a_format_says_so():
    with pytest.raises(ConfigError, match="use bf16"):
        gemm_s(load_gpu_type("a100_sxm_80gb"), Gemm(1024, 1024, 1024), 108, Format.fp8)
    with pytest.raises(ConfigError, match="format=bf16"):
        AnalyticCompute(load_gpu_type("a100_sxm_80gb"), TrainingSetup(format=Format.fp32))


@pytest.mark.parametrize("link", ["intra", "inter"])
def test_more_bandwidth_is_never_slower(link):
    case = _case()
    steps = []
    for factor in (0.5, 1.0, 4.0):
        old = getattr(case.cluster, link)
        cluster = replace(case.cluster, **{link: replace(old, bytes_per_s=old.bytes_per_s * factor)})
        steps.append(estimate_case(replace(case, cluster=cluster)).step_s)
    assert steps == sorted(steps, reverse=True)


def test_experts_have_their_own_shards():
    assert shards_of(Layout(dp=8, ep=8), TrainingSetup()) == (8, 1)
    assert shards_of(Layout(tp=2, dp=8, ep=4), TrainingSetup()) == (8, 4)


def _parameters(file: str, word: str) -> float:
    row = next(r for r in load_rows(PUBLISHED / f"{file}.csv") if word in r["model"])
    case = try_case(row | {"pp": "1", "vpp": "1", "tp": "1", "cp": "1", "ep": "1", "n_gpus": "1", "gbs": "64"})
    assert isinstance(case, Case), case
    return module_parameters(case.workload.backbone)


@pytest.mark.parametrize(
    ("word", "published"),
    [("DeepSeekV3", 671e9), ("Qwen3_30B", 30.5e9), ("Qwen3_235B", 235e9), ("GPT OSS 120B", 117e9),
     ("LLAMA3_70B", 70.6e9), ("LLAMA3.1_405B", 405.9e9)],
)  # fmt: skip
def test_parameters_of_published_mixtures_and_models(word, published):
    # the models' own cards
    assert _parameters("megatron_bridge_perf", word) == pytest.approx(published, rel=0.02)


def test_launches_bind_small_layers_and_no_longer_under_cuda_graphs():
    # 20 launches a forward of a layer that the GPU is done with long before
    tiny = layer_work(replace(VISION, num_layers=1), 1, 1, 1, 1, False, True, TrainingSetup())
    gpu = load_gpu_type("h100_sxm")
    assert forward_s(gpu, tiny, gpu.num_sms, TrainingSetup()) == pytest.approx(20 * gpu.launch_s, rel=1e-3)
    graphed = forward_s(gpu, tiny, gpu.num_sms, TrainingSetup(cuda_graphs=True))
    assert graphed <= 20.1e-6 < 20 * gpu.launch_s


@given(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2))
def test_device_and_host_beside_each_other(device_s, host_s):
    """Never faster than the longer one, never slower than one after the other; of two alike, the fourth root of two."""
    gpu = replace(load_gpu_type("h100_sxm"), launch_s=host_s)
    moved = device_s * gpu.memory_bytes_per_s * gpu.bandwidth_frac
    seconds = forward_s(gpu, Work((), moved, 1), gpu.num_sms, TrainingSetup())
    assert max(device_s, host_s) * (1 - 1e-9) <= seconds <= (device_s + host_s) * (1 + 1e-9)
    alike = replace(gpu, launch_s=device_s)
    assert forward_s(alike, Work((), moved, 1), gpu.num_sms, TrainingSetup()) == pytest.approx(2**0.25 * device_s)


def test_copies_of_tokens_are_sorted_once_more_behind_an_all_to_all():
    """By hand: 8 bytes a value of each copy, read and written there and back; not where each rank has one expert, or
    where DeepEP brings each token once."""
    sparse = replace(LLM, num_experts=8, moe_top_k=2)

    def moved(ep: int, dispatcher: Dispatcher) -> float:
        setup = TrainingSetup(expert_dispatcher=dispatcher)
        return layer_work(sparse, 3, 1, 1, ep, False, False, setup).moved_bytes

    copies = 3 * LLM.tokens_per_item * 2 * LLM.hidden_size
    assert moved(4, Dispatcher.alltoall) - moved(4, Dispatcher.flex) == 8 * copies
    assert moved(8, Dispatcher.alltoall) == moved(8, Dispatcher.flex)
