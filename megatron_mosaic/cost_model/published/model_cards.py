"""Public models by name: their published dimensions, for what a table leaves out.

A name is told apart by words: those of the family and of the size, in any order, `_`, `-` and spaces alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Columns of a row that a card fills: layers, width, MLP, heads, key-value heads, vocabulary
_COLUMNS = ("num_layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab")
_MLA = {"kv_channels": 128, "q_latent_size": 1536, "kv_latent_size": 512}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """`columns` fill empty cells of a row, `fields` are of ModuleConfig and no columns."""

    columns: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def _sizes(*numbers: int) -> dict[str, int]:
    return dict(zip(_COLUMNS, numbers))


def _experts(count: int, top_k: int, width: int, **more: Any) -> dict[str, Any]:
    return {"num_experts": count, "moe_top_k": top_k, "ffn_hidden_size": width} | more


_LLAMA: dict[str, Any] = {"gated": True, "untied_output": True}
_TIED: dict[str, Any] = {"gated": True, "untied_output": False}
_QWEN3 = _LLAMA | {"kv_channels": 128}
_QWEN3_TIED = _TIED | {"kv_channels": 128}
_GPT: dict[str, Any] = {}

# (words of the name, sizes, fields of ModuleConfig); the first whose words are all there counts
_CARDS: tuple[tuple[str, dict[str, int], dict[str, Any]], ...] = (
    # huggingface.co/deepseek-ai, config.json; DeepSeek-V3 technical report, section 4.2: one layer of MTP
    ("deepseekv3", _sizes(61, 7168, 18432, 128, 128, 129280), _LLAMA | _MLA | _experts(
        256, 8, 2048, shared_expert_size=2048, num_dense_layers=3, dense_ffn_size=18432, num_mtp_layers=1)),
    ("deepseekv2 lite", _sizes(27, 2048, 10944, 16, 16, 102400), _LLAMA | _MLA | {"q_latent_size": 0} | _experts(
        64, 6, 1408, shared_expert_size=2816, num_dense_layers=1, dense_ffn_size=10944)),
    ("deepseekv2", _sizes(60, 5120, 12288, 128, 128, 102400), _LLAMA | _MLA | _experts(
        160, 6, 1536, shared_expert_size=3072, num_dense_layers=1, dense_ffn_size=12288)),
    ("kimi k2", _sizes(61, 7168, 18432, 64, 64, 163840), _LLAMA | _MLA | _experts(  # moonshotai/Kimi-K2-Base
        384, 8, 2048, shared_expert_size=2048, num_dense_layers=1, dense_ffn_size=18432)),
    # huggingface.co/Qwen, config.json
    ("qwen3 30b", _sizes(48, 2048, 6144, 32, 4, 151936), _QWEN3 | _experts(128, 8, 768)),
    ("qwen3 235b", _sizes(94, 4096, 12288, 64, 4, 151936), _QWEN3 | _experts(128, 8, 1536)),
    ("qwen3 0.6b", _sizes(28, 1024, 3072, 16, 8, 151936), _QWEN3_TIED),
    ("qwen3 1.7b", _sizes(28, 2048, 6144, 16, 8, 151936), _QWEN3_TIED),
    ("qwen3 4b", _sizes(36, 2560, 9728, 32, 8, 151936), _QWEN3_TIED),
    ("qwen3 8b", _sizes(36, 4096, 12288, 32, 8, 151936), _QWEN3),
    ("qwen3 14b", _sizes(40, 5120, 17408, 40, 8, 151936), _QWEN3),
    ("qwen3 32b", _sizes(64, 5120, 25600, 64, 8, 151936), _QWEN3),
    ("qwen2.5 0.5b", _sizes(24, 896, 4864, 14, 2, 151936), _TIED),
    ("qwen2.5 1.5b", _sizes(28, 1536, 8960, 12, 2, 151936), _TIED),
    ("qwen2.5 3b", _sizes(36, 2048, 11008, 16, 2, 151936), _TIED),
    ("qwen2.5 7b", _sizes(28, 3584, 18944, 28, 4, 152064), _LLAMA),
    ("qwen2.5 14b", _sizes(48, 5120, 13824, 40, 8, 152064), _LLAMA),
    ("qwen2.5 32b", _sizes(64, 5120, 27648, 40, 8, 152064), _LLAMA),
    ("qwen2.5 72b", _sizes(80, 8192, 29568, 64, 8, 152064), _LLAMA),
    ("qwen2 0.5b", _sizes(24, 896, 4864, 14, 2, 151936), _TIED),
    ("qwen2 1.5b", _sizes(28, 1536, 8960, 12, 2, 151936), _TIED),
    ("qwen2 7b", _sizes(28, 3584, 18944, 28, 4, 152064), _LLAMA),
    ("qwen2 72b", _sizes(80, 8192, 29568, 64, 8, 152064), _LLAMA),
    # huggingface.co/meta-llama, config.json
    ("llama2 7b", _sizes(32, 4096, 11008, 32, 32, 32000), _LLAMA),
    ("llama2 13b", _sizes(40, 5120, 13824, 40, 40, 32000), _LLAMA),
    ("llama2 70b", _sizes(80, 8192, 28672, 64, 8, 32000), _LLAMA),
    ("llama3 1b", _sizes(16, 2048, 8192, 32, 8, 128256), _TIED),
    ("llama3 3b", _sizes(28, 3072, 8192, 24, 8, 128256), _TIED),
    ("llama3 8b", _sizes(32, 4096, 14336, 32, 8, 128256), _LLAMA),
    ("llama3 70b", _sizes(80, 8192, 28672, 64, 8, 128256), _LLAMA),
    ("llama3 405b", _sizes(126, 16384, 53248, 128, 8, 128256), _LLAMA),
    ("mistral 7b", _sizes(32, 4096, 14336, 32, 8, 32000), _LLAMA),  # Jiang et al. 2023, table 1
    ("mixtral 8x7b", _sizes(32, 4096, 14336, 32, 8, 32000), _LLAMA | _experts(8, 2, 14336)),  # Jiang et al. 2024
    ("mixtral 8x22b", _sizes(56, 6144, 16384, 48, 8, 32768), _LLAMA | _experts(8, 2, 16384)),
    # huggingface.co/openai/gpt-oss-120b, config.json: windows of 128 tokens in every second layer
    ("gpt oss 120b", _sizes(36, 2880, 2880, 64, 8, 201088), _LLAMA | {"kv_channels": 64} | _experts(
        128, 4, 2880, attention_window=128, num_full_attention_layers=18)),
    # Brown et al. 2020, table 2.1; Narayanan et al. 2021, table 1. The vocabulary padded as Megatron does
    ("gpt 1.3b", _sizes(24, 2048, 8192, 16, 16, 51200), _GPT),
    ("gpt 1.7b", _sizes(24, 2304, 9216, 24, 24, 51200), _GPT),
    ("gpt 2.7b", _sizes(32, 2560, 10240, 32, 32, 51200), _GPT),
    ("gpt 3.6b", _sizes(30, 3072, 12288, 32, 32, 51200), _GPT),
    ("gpt 6.7b", _sizes(32, 4096, 16384, 32, 32, 51200), _GPT),
    ("gpt 7.5b", _sizes(36, 4096, 16384, 32, 32, 51200), _GPT),
    ("gpt 13b", _sizes(40, 5120, 20480, 40, 40, 51200), _GPT),
    ("gpt 18.4b", _sizes(40, 6144, 24576, 48, 48, 51200), _GPT),
    ("gpt 22b", _sizes(48, 6144, 24576, 64, 64, 51200), _GPT),
    ("gpt 39.1b", _sizes(48, 8192, 32768, 64, 64, 51200), _GPT),
    ("gpt 76.1b", _sizes(60, 10240, 40960, 80, 80, 51200), _GPT),
    ("gpt 145.6b", _sizes(80, 12288, 49152, 96, 96, 51200), _GPT),
    ("gpt 175b", _sizes(96, 12288, 49152, 96, 96, 51200), _GPT),
    ("gpt 310.1b", _sizes(96, 16384, 65536, 128, 128, 51200), _GPT),
    ("gpt 530b", _sizes(105, 20480, 81920, 128, 128, 51200), _GPT),
    ("gpt 1008b", _sizes(128, 25600, 102400, 160, 160, 51200), _GPT),
)  # fmt: skip
# Encoders: layers, width, MLP, heads
_ENCODER_COLUMNS = ("enc_layers", "enc_hidden", "enc_ffn", "enc_heads")
_ENCODERS = (
    ("vit l", (24, 1024, 4096, 16)),  # Dosovitskiy et al. 2021, table 1; CLIP's too
    ("vit h", (32, 1280, 5120, 16)),
    ("vit g 14", (48, 1664, 8192, 16)),  # Zhai et al. 2022, table 2: G/14
    ("vit 22b", (48, 6144, 24576, 48)),  # Dehghani et al. 2023, table 1
    ("internvit 6b", (45, 3200, 12800, 25)),  # OpenGVLab/InternViT-6B-448px-V2_5, config.json
    ("internvit 300m", (24, 1024, 4096, 16)),
    ("siglip so400m", (27, 1152, 4304, 16)),  # google/siglip-so400m-patch14-384, config.json
)
_GATED = frozenset({"llama", "qwen", "mixtral", "mistral", "deepseek", "internlm", "kimi", "swiglu"})
_VERSIONS = (
    (r"llama.?3\.[123]", "llama3"), (r"llama.?([23])", r"llama\1"), (r"deepseek.?v?([23])", r"deepseekv\1"),
    (r"qwen.?(2\.5|2|3)", r"qwen\1"), (r"gpt.?oss", "gpt oss"), (r"gpt.?3(?![.\d])", "gpt"), (r"kimi.?k2", "kimi k2"),
    (r"vit.?(l|h|g)\b", r"vit \1"), (r"megatron", "gpt"),
)  # fmt: skip


def model_card(name: str, num_layers: int = 0) -> ModelCard | None:
    """The card of a model's name; None where none is known. `num_layers`: of a truncated proxy, which keeps one layer
    without experts; 0: all."""
    words = _words(name.rpartition("+")[2])  # behind those of encoders
    for known, columns, fields in _CARDS:
        if {*known.split()} <= words:
            more = dict(fields)
            if "w o mtp" in " ".join(re.findall(r"[a-z0-9]+", name.lower())) or "proxy" in words:
                more.pop("num_mtp_layers", None)
            if 0 < num_layers < columns["num_layers"] / 2:  # truncated
                more.pop("num_mtp_layers", None)
                if fields.get("num_dense_layers"):
                    more["num_dense_layers"] = 1
            return ModelCard(columns=columns, fields=more)
    return None


def encoder_columns(name: str) -> Mapping[str, int]:
    """What is known of the encoder that a model's name says; nothing where it says none."""
    words = _words(name.rpartition("+")[0])
    return next((dict(zip(_ENCODER_COLUMNS, sizes)) for known, sizes in _ENCODERS if {*known.split()} <= words), {})


def is_gated(name: str) -> bool:
    """Whether a model of this name has gated MLPs, no biases and a separate output matrix."""
    return any(re.sub(r"[\d.v]+$", "", word) in _GATED for word in _words(name))


def _words(name: str) -> frozenset[str]:
    text = re.sub(r"[_\-/()\[\]+,]", " ", name.lower())
    for pattern, normal in _VERSIONS:
        text = re.sub(pattern, normal + " ", text)
    text = re.sub(r"(\d)\s*b\b", r"\1b", text)
    found = re.findall(r"[a-z0-9.]+", text)
    return frozenset([*found, *(re.sub(r"\.0b$", "b", word) for word in found)])
