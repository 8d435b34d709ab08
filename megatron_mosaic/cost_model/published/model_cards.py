"""What published tables leave out about models that they name: public model cards, one entry a model."""

from __future__ import annotations

from typing import Any

_MLA = {"num_query_groups": 128, "kv_channels": 128, "q_latent_size": 1536, "kv_latent_size": 512}

# (words of the model's name, fields of ModuleConfig); the first that matches counts
MODEL_CARDS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("deepseekv4",), {}),
    (
        ("deepseekv3",),  # DeepSeek-V3 technical report, section 4.2
        _MLA | {"num_experts": 256, "moe_top_k": 8, "ffn_hidden_size": 2048, "shared_expert_size": 2048,
                "num_dense_layers": 3, "dense_ffn_size": 18432},
    ),
    (
        ("deepseekv2",),  # DeepSeek-V2 technical report, section 3.1.2
        _MLA | {"num_experts": 160, "moe_top_k": 6, "ffn_hidden_size": 1536, "shared_expert_size": 3072,
                "num_dense_layers": 1, "dense_ffn_size": 12288},
    ),
    (
        ("qwen3", "30b"),  # huggingface.co/Qwen/Qwen3-30B-A3B, config.json
        {"num_experts": 128, "moe_top_k": 8, "ffn_hidden_size": 768, "kv_channels": 128},
    ),
    (
        ("qwen3", "235b"),  # huggingface.co/Qwen/Qwen3-235B-A22B, config.json
        {"num_experts": 128, "moe_top_k": 8, "ffn_hidden_size": 1536, "kv_channels": 128},
    ),
    (
        ("gpt oss 120b",),  # huggingface.co/openai/gpt-oss-120b, config.json
        {"num_experts": 128, "moe_top_k": 4, "ffn_hidden_size": 2880, "kv_channels": 64},
    ),
    (("mixtral", "8x7b"), {"num_experts": 8, "moe_top_k": 2}),  # Jiang et al. 2024, table 1
    (("mixtral", "8x22b"), {"num_experts": 8, "moe_top_k": 2}),
)  # fmt: skip
_GATED = ("llama", "qwen", "mixtral", "deepseek", "oss", "internlm", "swiglu")


def model_card(name: str, num_layers: int) -> dict[str, Any] | None:
    """Fields of the model's card; None where nothing is known that the table leaves out."""
    lower = name.lower()
    for words, card in MODEL_CARDS:
        if all(word in lower for word in words):
            if num_layers < 10 and card.get("num_dense_layers"):
                return card | {"num_dense_layers": 1}  # a truncated proxy keeps one dense layer
            return card or None
    return None


def is_gated(name: str) -> bool:
    """Whether a model of this name has gated MLPs, no biases and a separate output matrix."""
    return any(word in name.lower() for word in _GATED)
