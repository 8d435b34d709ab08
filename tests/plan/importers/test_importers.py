"""Imported models against the parameters that their cards publish, and what is refused. Configs are written by hand."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cli.main import main
from megatron_mosaic.config import load_workload
from megatron_mosaic.cost_model.effects.counts import module_parameters
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.importers.hugging_face import import_hugging_face
from megatron_mosaic.plan.importers.megatron_args import import_megatron_arguments
from megatron_mosaic.plan.workload_file import load_workload_file

LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN25 = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "use_sliding_window": False, "sliding_window": 32768,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}, "vision_config": CLIP}
QWEN2_VL = {
    "model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
QWEN25_VL = QWEN2_VL | {
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2,
    },
}  # fmt: skip
QWEN3_VL = {
    "model_type": "qwen3_vl_moe",
    "text_config": QWEN3_MOE | {"model_type": "qwen3_vl_moe_text"},
    "vision_config": {
        "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 4304,
        "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "out_hidden_size": 2048, "temporal_patch_size": 2,
    },
}  # fmt: skip
INTERNVL = {
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "llm_config": LLAMA3,
    "vision_config": {
        "model_type": "intern_vit_6b", "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45,
        "num_attention_heads": 25, "image_size": 448, "patch_size": 14,
    },
}  # fmt: skip
EXPERTS = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 8 --vocab-size 8 --num-experts 2"
CONFIGS = {
    "llama3": LLAMA3, "qwen25": QWEN25, "qwen3_moe": QWEN3_MOE, "deepseek_v3": DEEPSEEK_V3, "llava": LLAVA,
    "qwen2_vl": QWEN2_VL, "qwen25_vl": QWEN25_VL, "qwen3_vl": QWEN3_VL, "internvl": INTERNVL,
}  # fmt: skip


def imported(config):
    return import_hugging_face(config, name="model", where="config.json")[0]


@pytest.mark.parametrize(
    ("name", "text_billions", "vision_millions"),
    [
        ("llama3", 8.03, 0), ("qwen25", 0.494, 0), ("qwen3_moe", 30.5, 0), ("deepseek_v3", 671.0, 0),
        ("llava", 6.74, 303 + 21), ("qwen2_vl", 7.616, 675), ("qwen25_vl", 7.616, 675), ("qwen3_vl", 30.5, 0),
        ("internvl", 8.03, 5540 + 69),
    ],
)  # fmt: skip
def test_imported_models_have_their_published_parameters(name, text_billions, vision_millions):
    # model cards; CLIP-L 303M, InternViT-6B V2.5 5.54B, Qwen2-VL's ViT 675M, each with its projector
    workload = imported(CONFIGS[name])
    assert module_parameters(workload.backbone) == pytest.approx(1e9 * text_billions, rel=0.01)
    if vision_millions:
        vision = workload.by_name["vision"]
        assert module_parameters(vision) == pytest.approx(1e6 * vision_millions, rel=0.03)


def test_what_a_vision_config_says():
    llava, old, new, deep, intern = (
        imported(CONFIGS[name]).by_name["vision"] for name in ("llava", "qwen2_vl", "qwen25_vl", "qwen3_vl", "internvl")
    )
    assert (llava.tokens_per_item, llava.input_size, llava.projector_size) == (576, 588, 4096)
    assert (old.hidden_size, old.gated, old.merge_tokens, old.projector_size) == (1280, False, 4, 5120)
    assert (new.gated, new.attention_window, new.num_full_attention_layers) == (True, 64, 4)
    assert (deep.input_size, deep.output_size) == (3 * 2 * 16**2, 2048)
    assert (intern.tokens_per_item, intern.merge_tokens, intern.hidden_size) == (1024, 4, 3200)
    assert imported(INTERNVL).edges[0].rows_per_item == 256


def test_megatron_arguments():
    text = """
    # Mixtral 8x7B
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \\
    --group-query-attention --num-query-groups=8 --swiglu --untie-embeddings-and-output-weights
    --seq-length 4096 --max-position-embeddings 32768 --vocab-size 31999 --make-vocab-size-divisible-by 64
    --num-experts 8 --moe-router-topk 2 --tensor-model-parallel-size 2 --lr 1e-4 --bf16 --global-batch-size 512
    """
    workload, assumed = import_megatron_arguments(text, name="mixtral", where="args.txt")
    assert module_parameters(workload.backbone) == pytest.approx(46.7e9, rel=0.01)
    assert (workload.global_batch_size, workload.backbone.vocab_size, assumed) == (512, 32000, ())


def test_megatron_arguments_of_latent_attention_and_leading_dense_layers():
    text = (
        "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --swiglu "
        "--seq-length 4096 "
        "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --v-head-dim 128 --vocab-size 129280 "
        "--untie-embeddings-and-output-weights --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048 "
        "--moe-shared-expert-intermediate-size 2048 --moe-layer-freq '([0]*3+[1]*58)'"
    )
    workload, assumed = import_megatron_arguments(text, name="deepseek", where="args.txt")
    assert workload.backbone == imported(DEEPSEEK_V3).backbone
    assert assumed == ("256 samples a step",)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("--num-layers 2", "hidden_size"),
        ("--num-layers x --hidden-size 64 --num-attention-heads 4", "num_layers"),
        ("--num-layers 'open", "args.txt"),
        (
            f"{EXPERTS} --moe-layer-freq [0,1]*2",
            "--moe-layer-freq",
        ),
        *(
            (f"{EXPERTS} --moe-layer-freq '{layers}'", "--moe-layer-freq")
            for layers in ("[,]", "[0 1]*2", "[01,1,1,1]", "[0]*1+oops+[1]*3", "([0]*1+[1]*2)*2", "(", "2")
        ),
    ],
)
def test_arguments_that_do_not_make_a_model_are_refused(text, where):
    with pytest.raises(ConfigError) as caught:
        import_megatron_arguments(text, name="x", where="args.txt")
    assert where in caught.value.where


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({}, "model_type"),
        ({"model_type": "mamba"}, "model_type"),
        (LLAMA3 | {"hidden_size": "wide"}, "hidden_size"),
        (LLAMA3 | {"num_hidden_layers": -1}, "num_hidden_layers"),
        ({key: value for key, value in LLAMA3.items() if key != "vocab_size"} | {"model_type": "qwen3"}, "vocab_size"),
        (LLAVA | {"vision_config": []}, "vision_config"),
        (LLAVA | {"vision_config": CLIP | {"patch_size": 0}}, "patch_size"),
        (QWEN2_VL | {"vision_config": QWEN2_VL["vision_config"] | {"patch_size": 0}}, "patch_size"),
        *(
            (QWEN2_VL | {"vision_config": QWEN2_VL["vision_config"] | {"mlp_ratio": value}}, "mlp_ratio")
            for value in ("big", math.nan, math.inf, 1e300, [4], True, -1, 0)
        ),
        *(
            (INTERNVL | {"downsample_ratio": value}, "downsample_ratio")
            for value in ("half", math.nan, [0.5], 0, -0.5, 5e-324)
        ),
        ([], "config.json"),
    ],
)
def test_configs_that_do_not_make_a_model_are_refused(config, where):
    with pytest.raises(ConfigError) as caught:
        imported(config)
    assert where in caught.value.where


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**9), st.floats(), st.text(max_size=5), st.lists(st.integers(0, 3))
)


KEYS = sorted({*LLAMA3, *CLIP, *QWEN2_VL["vision_config"], *QWEN25_VL["vision_config"], "downsample_ratio"})


@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), VALUES)
def test_damaged_configs_are_read_or_refused(name, changes, vision):
    config = CONFIGS[name] | changes
    if isinstance(vision, str):
        config["vision_config"] = vision
    for key, inner in config.items():
        if isinstance(inner, dict):
            config[key] = inner | changes
    try:
        assert imported(config).backbone.num_layers > 0
    except ConfigError as error:
        assert error.where


@given(st.text("[]()01,*+ ", max_size=24))
def test_damaged_lists_of_layers_are_read_or_refused(layers):
    try:
        workload, _ = import_megatron_arguments(f"{EXPERTS} --moe-layer-freq '{layers}'", name="x", where="args.txt")
        assert workload.backbone.num_experts == 2
    except ConfigError as error:
        assert "moe-layer-freq" in error.where


def test_the_command_writes_a_file_that_plans(tmp_path, capsys):
    source = tmp_path / "Qwen2.5-VL-7B" / "config.json"
    source.parent.mkdir()
    source.write_text(json.dumps(QWEN25_VL), encoding="utf-8")
    out = tmp_path / "mine.yaml"
    assert main(["import", f"hf:{source}", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"]["name"] == "qwen2_5_vl_7b"
    assert result["model"] == yaml.safe_load(out.read_text(encoding="utf-8"))
    assert load_workload_file(out) == load_workload([f"model={out}"])
    assert load_workload([f"model={out}", "model.modules.llm.num_layers=4"]).backbone.num_layers == 4
    assert main(["import", f"hf:{source.parent}"]) == 0
    assert "attention_window: 64" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["config.json", "hf:", "onnx:model", "hf:/nowhere/config.json"])
def test_a_source_that_is_none_is_refused(source, capsys):
    assert main(["import", source]) == 2
    assert "expected" in capsys.readouterr().err
