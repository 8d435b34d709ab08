"""A workload from a list of Megatron arguments: a file of words as on the command line of pretrain_gpt.py."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.importers.keys import Keys
from megatron_mosaic.plan.workload import ModuleConfig, Role, Workload

_TERM = re.compile(r"(?P<bits>\[\s*[01](?:\s*,\s*[01])*\s*,?\s*\])\s*(?:\*\s*(?P<times>\d{1,4}))?")  # [0]*3, [1,0]
_DEFAULTS = {"make_vocab_size_divisible_by": 128, "global_batch_size": 256, "mtp_num_layers": 0}


def import_megatron_arguments(text: str, *, name: str, where: str) -> tuple[Workload, tuple[str, ...]]:
    """The workload, and what was assumed. Arguments that say nothing of the model are passed over.

    ConfigError for words that cannot be split, and for what is missing or no number.
    """
    keys = Keys.of(where, _parse(text, where), _DEFAULTS)
    assumed = () if "global_batch_size" in keys.data else (f"{_DEFAULTS['global_batch_size']} samples a step",)
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    latent = keys.has("multi_latent_attention")
    gated = keys.has("swiglu")
    module = ModuleConfig(
        name="llm",
        role=Role.backbone,
        num_layers=keys.count("num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_query_groups=keys.count("num_query_groups", default=0) if keys.has("group_query_attention") else 0,
        kv_channels=keys.count("v_head_dim", default=128) if latent else keys.count("kv_channels", default=0),
        tokens_per_item=keys.count("seq_length"),
        vocab_size=_vocabulary(keys),
        gated=gated,
        causal=True,
        untied_output=keys.has("untie_embeddings_and_output_weights"),
        q_latent_size=keys.count("q_lora_rank", default=0) if latent else 0,
        kv_latent_size=keys.count("kv_lora_rank", default=32) if latent else 0,
        num_mtp_layers=keys.count("mtp_num_layers"),
        **_mlp(keys, hidden, gated),
    )
    workload = Workload(name=name, modules=(module,), global_batch_size=keys.count("global_batch_size"))
    return workload, assumed


def _mlp(keys: Keys, hidden: int, gated: bool) -> dict[str, Any]:
    # as Megatron's arguments.py: a gated MLP is 2/3 as wide, in multiples of 64
    usual = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    dense = keys.count("ffn_hidden_size", default=usual)
    experts = keys.count("num_experts", default=0)
    if not experts:
        return {"ffn_hidden_size": dense}
    num_dense = _dense_layers(keys)
    return {
        "ffn_hidden_size": keys.count("moe_ffn_hidden_size", default=dense),
        "num_experts": experts,
        "moe_top_k": keys.count("moe_router_topk", default=2),
        "shared_expert_size": keys.count("moe_shared_expert_intermediate_size", default=0),
        "num_dense_layers": num_dense,
        "dense_ffn_size": dense if num_dense else 0,
    }


def _dense_layers(keys: Keys) -> int:
    """Layers without experts at the front: `--moe-layer-freq` is 1, or a list like ([0]*3+[1]*58)."""
    said = str(keys.value("moe_layer_freq") or "1").strip()
    if said == "1":
        return 0
    inner = said[1:-1] if said.startswith("(") and said.endswith(")") else said
    terms = [_TERM.fullmatch(term.strip()) for term in inner.split("+")]
    layers = [int(bit) for term in terms if term for bit in re.findall("[01]", term["bits"]) * int(term["times"] or 1)]
    dense = layers.index(1) if 1 in layers else 0
    if None in terms or len(layers) != keys.count("num_layers") or 0 in layers[dense:]:
        raise ConfigError(
            f"{keys.where}: --moe-layer-freq", got=said[:60], expected="dense layers in front of those with experts, "
            "one entry a layer: ([0]*3+[1]*58)", fix="write a model file by hand, as in conf/model",
        )  # fmt: skip
    return dense


def _vocabulary(keys: Keys) -> int:
    """Padded for tp, as Megatron does."""
    if keys.has("padded_vocab_size"):
        return keys.count("padded_vocab_size")
    multiple = keys.count("make_vocab_size_divisible_by") * keys.count("tensor_model_parallel_size", default=1)
    return math.ceil(keys.count("vocab_size") / max(1, multiple)) * max(1, multiple)


def _parse(text: str, where: str) -> dict[str, Any]:
    """Argument (without dashes, `_` for `-`) -> its value as a number where it is one; True without a value."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(where, got=str(error), expected="words of a command line", fix="close the quotes") from error
    found: dict[str, Any] = {}
    for position, word in enumerate(words):
        if not re.match(r"--[a-zA-Z]", word):
            continue
        key, equals, value = word[2:].partition("=")
        following = words[position + 1] if position + 1 < len(words) else "--"
        if not equals:
            value = "" if re.match(r"--[a-zA-Z]", following) else following
        found[key.replace("-", "_")] = int(value) if re.fullmatch(r"-?\d{1,18}", value) else value or True
    return found
