"""A workload from the `config.json` of a Hugging Face model: LLaMA-like text models, and vision encoders before them.

    text       llama mistral mixtral qwen2 qwen3 (and _moe) deepseek_v2 deepseek_v3 kimi_k2
    vision     llava qwen2_vl qwen2_5_vl qwen3_vl (and _moe) internvl_chat

What a config does not say is in `assumed`: the length of a sample, images, the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.importers.keys import Keys
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

SEQUENCE, BATCH, PATCHES = 4096, 256, 1024  # tokens of a sample, samples of a step, patches of an image
_TEXT = {
    "llama": {  # transformers, LlamaConfig: what LLaVA-1.5's config leaves out
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {}, "mixtral": {}, "qwen2": {}, "qwen2_5_vl_text": {}, "qwen2_vl_text": {}, "qwen2_vl": {},
    "qwen2_5_vl": {}, "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {}, "qwen3_vl_text": {}, "qwen3_vl_moe_text": {},
    "deepseek_v2": {}, "deepseek_v3": {}, "kimi_k2": {}, "internlm2": {}, "internlm3": {},
}  # fmt: skip


def import_hugging_face(config: object, *, name: str, where: str) -> tuple[Workload, tuple[str, ...]]:
    """The workload, and what was assumed. ConfigError names the key that is missing or wrong, or the kinds that are
    known."""
    keys = Keys.of(where, config)
    kind = keys.text("model_type")
    if kind in _VISION:
        inner, build = _VISION[kind]
        text = keys.inner(inner) if keys.has(inner) else keys
        backbone = _backbone(text, text.text("model_type") or kind, keys)
        encoder, patches = build(keys.inner("vision_config"), backbone.hidden_size, keys)
        rows = encoder.tokens_per_item // encoder.merge_tokens
        edge = Edge(source=encoder.name, target=backbone.name, rows_per_item=rows, width=backbone.hidden_size)
        assumed = ("one image a sample", *([f"{PATCHES} patches an image"] if patches else ()))
        return _workload(name, (encoder, backbone), (edge,)), (*_ASSUMED, *assumed)
    if kind in _TEXT:
        return _workload(name, (_backbone(keys, kind, keys),), ()), _ASSUMED
    raise ConfigError(
        f"{where}: model_type", got=kind or "nothing", expected=f"one of {sorted({*_TEXT, *_VISION})}",
        fix="write a model file by hand, as in conf/model",
    )  # fmt: skip


_ASSUMED = (f"samples of {SEQUENCE} tokens (or as long as the model allows)", f"{BATCH} samples a step")


def _workload(name: str, modules: tuple[ModuleConfig, ...], edges: tuple[Edge, ...]) -> Workload:
    return Workload(name=name, modules=modules, edges=edges, global_batch_size=BATCH)


def _backbone(found: Keys, kind: str, outer: Keys) -> ModuleConfig:
    if kind not in _TEXT:
        raise ConfigError(f"{found.where}: model_type", got=kind, expected=f"one of {sorted(_TEXT)}", fix="correct it")
    keys = Keys(where=found.where, data=found.data, defaults=_TEXT[kind])
    heads, longest = keys.count("num_attention_heads"), keys.count("max_position_embeddings", default=SEQUENCE)
    tied = keys.flag("tie_word_embeddings", outer.flag("tie_word_embeddings", False))
    window = keys.count("sliding_window", default=0) if keys.flag("use_sliding_window", kind == "mistral") else 0
    return ModuleConfig(
        name="llm",
        role=Role.backbone,
        num_layers=keys.count("num_hidden_layers"),
        hidden_size=keys.count("hidden_size"),
        num_heads=heads,
        num_query_groups=0 if keys.has("kv_lora_rank") else keys.count("num_key_value_heads", default=heads),
        kv_channels=keys.count("v_head_dim", "head_dim", default=0),
        tokens_per_item=min(SEQUENCE, longest),
        vocab_size=keys.count("vocab_size"),
        gated=True,
        causal=True,
        untied_output=not tied,
        q_latent_size=keys.count("q_lora_rank", default=0),
        kv_latent_size=keys.count("kv_lora_rank", default=0),
        num_mtp_layers=keys.count("num_nextn_predict_layers", default=0),
        attention_window=window,
        **_mlp(keys),
    )


def _mlp(keys: Keys) -> dict[str, Any]:
    """Fields of dense MLPs, or of experts."""
    experts = keys.count("n_routed_experts", "num_local_experts", "num_experts", default=0)
    dense = keys.count("intermediate_size")
    if not experts:
        return {"ffn_hidden_size": dense}
    width = keys.count("moe_intermediate_size", default=dense)
    first = keys.count("first_k_dense_replace", default=0)
    shared = keys.count("shared_expert_intermediate_size", default=0)
    return {
        "ffn_hidden_size": width,
        "num_experts": experts,
        "moe_top_k": keys.count("num_experts_per_tok"),
        "shared_expert_size": shared or keys.count("n_shared_experts", default=0) * width,
        "num_dense_layers": first,
        "dense_ffn_size": dense if first else 0,
    }


_Encoder = tuple[ModuleConfig, bool]  # and whether its number of patches was assumed


def _vision(**fields: Any) -> ModuleConfig:
    return ModuleConfig(name="vision", role=Role.encoder, **fields)


def _fixed_size(vision: Keys, width: int, image: int, patch: int, merge_tokens: int = 1) -> ModuleConfig:
    """A ViT on square images of one size, and a projector as wide as the backbone."""
    return _vision(
        num_layers=vision.count("num_hidden_layers"),
        hidden_size=vision.count("hidden_size"),
        num_heads=vision.count("num_attention_heads"),
        ffn_hidden_size=vision.count("intermediate_size"),
        tokens_per_item=_patches(vision, image, patch),
        input_size=3 * patch**2,
        output_size=width,
        merge_tokens=merge_tokens,
        projector_size=width,
    )


def _llava(vision: Keys, width: int, _: Keys) -> _Encoder:
    """CLIP, and two matrices with an activation function between (Liu et al. 2024, section 3.3)."""
    return _fixed_size(vision, width, vision.count("image_size"), vision.count("patch_size")), False


def _qwen(vision: Keys, width: int, _: Keys) -> _Encoder:
    """Any resolution: patches of two frames, merged by an MLP as wide as what it reads (Wang et al. 2024; Bai et al.
    2025). Qwen2-VL calls the encoder's width `embed_dim`, later ones `hidden_size`."""
    patch = vision.count("patch_size", "spatial_patch_size", least=1)
    merge = vision.count("spatial_merge_size", default=2)
    hidden = vision.count("embed_dim", "hidden_size")
    layers, window = vision.count("depth"), vision.count("window_size", default=0)
    full = vision.value("fullatt_block_indexes") or []
    ffn = vision.count("intermediate_size", default=int(hidden * vision.number("mlp_ratio", 4.0)))
    return _vision(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=vision.count("num_heads"),
        ffn_hidden_size=ffn,
        tokens_per_item=PATCHES,
        input_size=vision.count("in_channels", "in_chans", default=3)
        * vision.count("temporal_patch_size", default=2)
        * patch**2,
        output_size=width,
        gated="silu" in vision.text("hidden_act"),
        merge_tokens=merge**2,
        projector_size=hidden * merge**2,
        attention_window=(window // patch) ** 2 if window else 0,
        num_full_attention_layers=len(full) if window and isinstance(full, list) else 0,
    ), True


def _internvl(vision: Keys, width: int, outer: Keys) -> _Encoder:
    """InternViT, pixel shuffle, two matrices (Chen et al. 2024, section 3.1)."""
    shrink = round(1 / outer.number("downsample_ratio", 0.5))
    image, patch = vision.first("image_size"), vision.first("patch_size")
    return _fixed_size(vision, width, image, patch, merge_tokens=shrink**2), False


def _patches(vision: Keys, pixels: int, patch: int) -> int:
    if not 1 <= patch <= pixels:
        raise ConfigError(
            f"{vision.where}: patch_size", got=patch, expected=f"1 to image_size {pixels}", fix="correct it"
        )
    return (pixels // patch) ** 2


_VISION: Mapping[str, tuple[str, Callable[[Keys, int, Keys], _Encoder]]] = {
    "llava": ("text_config", _llava),
    "qwen2_vl": ("text_config", _qwen),
    "qwen2_5_vl": ("text_config", _qwen),
    "qwen3_vl": ("text_config", _qwen),
    "qwen3_vl_moe": ("text_config", _qwen),
    "internvl_chat": ("llm_config", _internvl),
    "internvl": ("text_config", _internvl),
}
