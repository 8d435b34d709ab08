"""What cells are read as: recomputation of each module, GPU names, model names, batches; and what is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.counts import count_activation_bytes, module_parameters
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED, validate_folder
from megatron_mosaic.cost_model.published.cells import Refusal
from megatron_mosaic.cost_model.published.model_cards import encoder_columns, is_gated, model_card
from megatron_mosaic.cost_model.published.prediction import estimate_case
from megatron_mosaic.cost_model.published.recompute_cells import Recomputation, read_recompute
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.training import Dispatcher, Recomputed, Sharding, TrainingSetup
from tests.cases import LLM

GPT = next(row for row in load_rows(PUBLISHED / "korthikanti2022_table5.csv") if row["row_id"].endswith("-0003"))
VLM = load_rows(PUBLISHED / "mimo_vlm_h100.csv")[0]
NONE, CORE = Recomputation(), frozenset({Recomputed.core_attn})


def case_of(row, **changes: str) -> Case:
    case = try_case(row | changes)
    assert isinstance(case, Case), case
    return case


def selective(*parts: str) -> Recomputation:
    return Recomputation(kind=Recompute.selective, parts=frozenset(map(Recomputed, parts)))


def full(layers_frac: float = 1.0) -> Recomputation:
    return Recomputation(kind=Recompute.full, layers_frac=layers_frac)


@pytest.mark.parametrize(
    ("cell", "backbone", "encoder"),
    [
        ("", NONE, NONE),
        ("none", NONE, NONE),
        ("recompute not stated", NONE, NONE),
        ("full", full(), full()),
        ("full (remat)", full(), full()),
        ("per layer", full(), full()),
        ("act ckpt", full(), full()),
        ("full, 2 of 8 layers", full(0.25), full(0.25)),
        ("full (block, num_layers=3)", full(0.5), full(0.5)),
        ("full (uniform, 1 layers)", full(), full()),
        ("selective", selective("core_attn"), selective("core_attn")),
        ("selective(core_attn)", selective("core_attn"), selective("core_attn")),
        ("--recompute-activations (selective)", selective("core_attn"), selective("core_attn")),
        ("mlp", selective("mlp"), selective("mlp")),
        ("selective op", selective("op"), selective("op")),
        ("core_attn, mlp", selective("core_attn", "mlp"), selective("core_attn", "mlp")),
        ("selective (layernorm moe_act)", selective("layernorm", "moe_act"), selective("layernorm", "moe_act")),
        ("encoder: full; LLM: not stated", NONE, full()),
        ("vision: none; llm: selective(core_attn)", selective("core_attn"), NONE),
        ("LLM: full", full(), NONE),
    ],
)
def test_recomputation_is_read_for_each_module(cell, backbone, encoder):
    assert read_recompute(cell, 6) == (backbone, encoder)


@pytest.mark.parametrize("cell", ["generator: full; llm: none", "mla_up_proj", "as usual", "llm: full; llm: none"])
def test_recomputation_that_is_not_clear_is_refused(cell):
    with pytest.raises(Refusal, match="recompute is"):
        read_recompute(cell, 6)


@given(st.text(max_size=40))
def test_any_cell_is_read_or_refused(cell):
    try:
        read_recompute(cell, 6)
    except Refusal as refusal:
        assert "recompute is" in str(refusal)


def test_modules_of_a_plan_recompute_what_their_cell_says():
    plan = case_of(VLM, recompute="encoder: full; LLM: not stated").plan
    assert plan.modules["vision"].recompute is Recompute.full
    assert plan.modules["llm"].recompute is Recompute.none


@pytest.mark.parametrize(
    ("gpu", "found"),
    [
        ("A100-80GB SXM (Selene)", "a100_sxm_80gb"),
        ("a100_40gb", "a100_sxm_40gb"),
        ("A100", "a100_sxm_80gb"),
        ("A100/A800-80GB", "a100_sxm_80gb"),
        ("h100_80gb", "h100_sxm"),
        ("H100-95GB HBM2e", "h100_sxm_96gb"),
        ("H100 96GB 500W", "h100_sxm_96gb"),
        ("H100 80GB 700W", "h100_sxm"),
        ("DGX-GB200", "gb200"),
        ("B200-SXM", "b200_sxm"),
    ],
)
def test_a_gpu_is_named_by_its_words(gpu, found):
    assert case_of(GPT, gpu=gpu).gpu == found


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ("H100-PCIe-80GB", "PCIe"),
        ("H100 NVL 94GB", "NVL"),
        ("H100-64GB", "none of its kind has this memory"),
        ("A100-80GB 300W", "300 W"),
        ("NVIDIA Hopper", "which of H100, H200 and H800"),
        ("MI300X", "no file in gpu_types"),
        ("SH1000", "no file in gpu_types"),
    ],
)
def test_another_memory_or_power_is_another_gpu(gpu, reason):
    found = try_case(GPT | {"gpu": gpu})
    assert isinstance(found, str) and reason in found


def test_of_two_names_the_slower_link_holds():
    both, a100 = (case_of(GPT, gpu=name).cluster.intra.bytes_per_s for name in ("A100/A800-80GB", "A100-80GB"))
    assert (both, a100) == (200e9, 300e9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mbs": "", "num_microbatches": ""}, "the micro batch is not stated"),
        ({"mbs": "2", "num_microbatches": "64", "gbs": "64"}, "a local batch?"),
    ],
)
def test_a_batch_that_may_be_the_local_one_is_refused(changes, reason):
    found = try_case(GPT | changes)
    assert isinstance(found, str) and reason in found


def test_the_micro_batch_follows_from_the_number_of_microbatches():
    assert case_of(GPT, mbs="", num_microbatches="32").plan.micro_batch_size == 2


@pytest.mark.parametrize(
    ("notes", "url", "offloads"),
    [
        ("activations offloaded to the host", "", True),
        ("no offload", "", False),
        ("offload=False; run 1", "", False),
        ("baseline", "https://example.org/offload_3b32b/baseline.json", False),
    ],
)
def test_offloading_is_read_in_the_notes_and_never_in_a_url(notes, url, offloads):
    assert case_of(VLM, notes=notes, source_url=url).setup.offloads_encoders is offloads


def test_a_run_that_cannot_have_fit_without_what_it_does_not_say_is_refused():
    report = validate_folder(PUBLISHED)["mimo_vlm_h100"]
    assert dict(report.refused) == {"its recomputation is not stated, and without any it does not fit": 1}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-2 7B", 6.74), ("LLAMA2-13B [SFT]", 13.02), ("llama2_70b", 68.98), ("Llama 3 8B", 8.03),
        ("Llama-3.1-70B", 70.55), ("LLAMA3.1_405B", 405.9), ("Llama 3.2 1B", 1.236), ("Llama-3.2-3B", 3.213),
        ("Qwen2.5-0.5B", 0.494), ("Qwen2.5 1.5B", 1.544), ("Qwen2.5-7B", 7.616), ("Qwen2.5-14B", 14.77),
        ("Qwen2.5-32B", 32.76), ("Qwen2.5-72B", 72.7), ("Qwen2-7B", 7.616), ("Qwen3-8B", 8.19), ("Qwen3 14B", 14.77),
        ("Qwen3-32B", 32.76), ("Qwen3_30B_a3B", 30.5), ("Qwen3_235B_a22B", 235.1), ("Mistral 7B", 7.24),
        ("Mixtral-8x7B", 46.7), ("Mixtral 8x22B", 140.6), ("DeepSeek-V2", 235.7), ("DeepSeek-V2-Lite", 15.7),
        ("DeepSeekV3 (w/o MTP)", 671.0), ("Kimi_K2", 1026.0), ("GPT OSS 120B", 116.8), ("GPT-3 175B", 174.6),
        ("GPT 39.1B", 39.1), ("GPT 3.6B", 3.56),
    ],
)  # fmt: skip
def test_a_public_model_has_its_published_number_of_parameters(name, billions):
    # the models' cards; biases of Qwen2's projections and norms of queries are left out: less than 0.1 %
    empty = dict.fromkeys(("num_layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab", "recompute", "vpp"), "")
    one = {"tp": "1", "pp": "1", "n_gpus": "8", "dp": "8", "num_microbatches": "", "gbs": "64", "mbs": "1"}
    case = case_of(GPT, model=name, **empty | one)
    assert module_parameters(case.workload.backbone) == pytest.approx(1e9 * billions, rel=0.01)


def test_names_are_told_apart_by_words():
    assert model_card("gpt3_mcore_te_tp2_pp2_cross_entropy_loss_fusion") is None
    assert not is_gated("gpt3_mcore_te_tp2_pp2_cross_entropy_loss_fusion")
    assert is_gated("gpt3_mcore_swiglu") and is_gated("Llama3 8B") and is_gated("qwen2.5-7b")
    card = model_card("ViT-22B + GPT-175B")
    assert card is not None and card.columns["hidden"] == 12288
    assert encoder_columns("ViT-22B + GPT-175B")["enc_hidden"] == 6144
    assert encoder_columns("InternViT-6B + Qwen2.5-7B")["enc_heads"] == 25
    assert not encoder_columns("GPT-175B")
    v3, without = model_card("DeepSeekV3"), model_card("DeepSeekV3 (w/o MTP)")
    assert v3 is not None and without is not None
    assert v3.fields["num_mtp_layers"] == 1 and "num_mtp_layers" not in without.fields


def test_what_a_row_states_wins_over_what_is_known_of_its_model():
    card = model_card("Llama3 8B")
    assert card is not None and card.columns["num_layers"] == 32
    changes = {"num_layers": "16", "hidden": "", "ffn_hidden": "", "heads": "", "kv_heads": "", "pp": "8", "vpp": ""}
    backbone = case_of(GPT, model="Llama3 8B", **changes).workload.backbone
    assert (backbone.num_layers, backbone.hidden_size, backbone.num_query_groups) == (16, 4096, 8)


@pytest.mark.parametrize(
    ("precision", "fsdp", "dispatcher", "sharding"),
    [
        ("fp16", "", Dispatcher.alltoall, Sharding.none),
        ("bf16", "", Dispatcher.alltoall, Sharding.optimizer),
        ("FP8-MX", "FSDP=0", Dispatcher.flex, Sharding.optimizer),
        ("bf16", "FSDP=64", Dispatcher.alltoall, Sharding.parameters),
    ],
)
def test_set_ups_follow_precision_and_sharding(precision, fsdp, dispatcher, sharding):
    setup = case_of(GPT, precision=precision, zero_or_fsdp=fsdp, gpu="H100-80GB").setup
    assert (setup.expert_dispatcher, setup.sharding) == (dispatcher, sharding)


def test_more_recomputation_takes_longer_and_keeps_less():
    seconds, kept = [], []
    for cell in ("none", "mlp", "core_attn, mlp, layernorm", "full"):
        found = estimate_case(case_of(GPT, recompute=cell, precision="bf16"))
        seconds.append(found.step_s)
        kept.append(found.peak_bytes)
    assert seconds == sorted(seconds)
    assert kept == sorted(kept, reverse=True)


def test_half_of_the_layers_recomputed_is_half_way():
    none, half, whole = (
        estimate_case(case_of(GPT, recompute=cell, precision="bf16", vpp="1"))
        for cell in ("none", "full, 1 of 2 layers", "full")
    )
    assert half.step_s == pytest.approx((none.step_s + whole.step_s) / 2, rel=0.01)
    assert none.peak_bytes > half.peak_bytes > whole.peak_bytes


def test_recomputed_parts_keep_what_they_start_from():
    h, f, tokens = LLM.hidden_size, LLM.ffn_hidden_size, LLM.tokens_per_item

    def kept(*parts: Recomputed) -> float:
        return count_activation_bytes(
            LLM, Part.layer, 1, value_bytes=2, fused_attention=True, recomputed=frozenset(parts)
        )

    assert kept() - kept(Recomputed.mlp) == tokens * 4 * f
    assert kept() - kept(Recomputed.layernorm) == tokens * 4 * h
    unfused = count_activation_bytes(LLM, Part.layer, 1, value_bytes=2, fused_attention=False, recomputed=CORE)
    assert unfused == kept()


def test_every_second_product_again_is_between_nothing_and_all():
    llama = {
        "precision": "bf16",
        "model": "Llama3 8B",
        "n_gpus": "8",
        "tp": "1",
        "pp": "1",
        "vpp": "",
        "gpu": "H100-95GB",
    }
    llama |= {"num_microbatches": "", "mbs": "1", "gbs": "8", "seq_len": "8192", "zero_or_fsdp": "FSDP", "hidden": ""}
    llama |= dict.fromkeys(("num_layers", "ffn_hidden", "heads", "kv_heads", "vocab"), "")
    none, op, full = (estimate_case(case_of(GPT | llama, recompute=each)) for each in ("none", "selective op", "full"))
    assert none.step_s < op.step_s < full.step_s
    assert none.peak_bytes > op.peak_bytes > full.peak_bytes
    # 32 layers of 8192 tokens: the input and attention's output, half of q k v, the projection, gate, up and down
    kept = 32 * 8192 * (2 * 4096 + 2 * 4096 + (2 * (4096 + 2 * 1024) + 4 * 14336 + 2 * 4096 + 2 * 4096) / 2)
    inputs = 32 * 8192 * 2 * 4096
    layer = 8192 * (8 * 4096 + 4 * 4096 + 4 * 1024 + 6 * 14336)  # that full recomputation has there for a moment
    assert op.peak_bytes - full.peak_bytes == pytest.approx(kept - inputs - layer, rel=0.01)


@pytest.mark.parametrize(
    ("name", "sharding", "copies"),
    [
        ("GPT-3 175B", "", 1),
        ("gpt3_mcore_te_tp2_pp2_cross_entropy_loss_fusion", "", 2),
        ("GPT-3 175B", "FSDP FULL_SHARD", 3),
        ("GPT-3 175B", "FSDP2", 3),
        ("GPT-3 175B", "FSDP=64", 1),
    ],
)
def test_losses_keep_copies_of_their_logits(name, sharding, copies):
    setup = case_of(GPT, model=name, zero_or_fsdp=sharding, precision="bf16").setup
    assert setup.loss_copies == copies
    last = GPT | {"pp": "1", "n_gpus": "8", "vpp": "", "dp": "1", "num_microbatches": "64", "precision": "bf16"}
    one = case_of(last)
    several = replace(one, setup=replace(one.setup, loss_copies=copies))
    added = estimate_case(several).peak_bytes - estimate_case(one).peak_bytes
    assert added == (copies - 1) * 4 * 2048 * 51200 / 8  # one sequence a microbatch, tp8


def test_an_optimizer_that_fewer_ranks_share_weighs_more():
    row = GPT | {"precision": "bf16", "zero_or_fsdp": "zero1=-1", "tp": "8", "pp": "1", "vpp": "", "n_gpus": "64"}
    row |= {"recompute": "none", "gbs": "64"}
    few, all_of_them = case_of(row, zero_or_fsdp="zero1=2"), case_of(row)
    assert (few.setup.optimizer_shards, all_of_them.setup.optimizer_shards) == (2, 0)
    assert replace(few.setup, optimizer_shards=0) == all_of_them.setup
    assert isinstance(few.setup, TrainingSetup)
    more = estimate_case(few).peak_bytes - estimate_case(all_of_them).peak_bytes
    parameters = module_parameters(few.workload.backbone) / 8
    assert more == pytest.approx(12 * parameters * (1 / 2 - 1 / 8), rel=0.01)
