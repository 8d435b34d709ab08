"""What a cell says about recomputation, for each module: Megatron's words, those of other trainers, lists of parts.

full | selective(core_attn) | mlp, layernorm | full, 4 of 8 layers | encoder: full; LLM: not stated
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_mosaic.cost_model.published.cells import Refusal, words_of
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.training import Recomputed

_ENCODER = frozenset({"enc", "encoder", "vision", "vit", "image", "audio"})
_BACKBONE = frozenset({"llm", "lm", "language", "backbone", "decoder", "gpt", "text"})
_NOTHING = frozenset({"none", "no", "off", "false", "0", "without", "disabled"})
_FULL = frozenset({"full", "remat", "ckpt", "checkpointing", "checkpoint", "uniform", "block"})
_SELECTIVE = frozenset({"selective", "activations"})  # --recompute-activations
_CORE = frozenset({"core", "attn", "core_attn", "attention"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation:
    """Of one module: how much, which parts where it is selective, which share of the layers where it is full."""

    kind: Recompute = Recompute.none
    parts: frozenset[Recomputed] = frozenset({Recomputed.core_attn})
    layers_frac: float = 1.0


def read_recompute(text: str, stage_layers: int) -> tuple[Recomputation, Recomputation]:
    """Of the backbone, whose stages have so many layers, and of an encoder. Not stated: none. Refusal for what is not
    clear."""
    named = re.split(r"[;|]", text)
    if not any(":" in part for part in named):
        both = _read(text, stage_layers)
        return both, both
    found = {}
    for part in named:
        name, _, said = part.partition(":")
        words = words_of(name)
        role = "encoder" if words & _ENCODER else "backbone" if words & _BACKBONE else ""
        if not role or role in found:
            raise Refusal(f"recompute is {text[:60]!r}: which module {name.strip()[:20]!r} is, is not clear")
        found[role] = _read(said, stage_layers)
    return found.get("backbone", Recomputation()), found.get("encoder", Recomputation())


def _read(text: str, stage_layers: int) -> Recomputation:
    words = frozenset(re.findall(r"[a-z0-9_.]+", text.lower().replace("-", "_")))
    tokens = words_of(text.replace("_", " "))
    if not tokens or "not stated" in text.lower() or (tokens & _NOTHING and not tokens & (_FULL | _SELECTIVE)):
        return Recomputation()
    parts = {part for part in Recomputed if part.value in words}
    if tokens & _CORE:
        parts.add(Recomputed.core_attn)
    if tokens & {"op", "ops"}:
        parts.add(Recomputed.op)
    if unknown := words & {"mla_up_proj", "shared_experts"}:
        raise Refusal(f"recompute is {text[:60]!r}: {', '.join(sorted(unknown))} alone is not modelled")
    if "per layer" in text.lower() or tokens & _FULL:
        share = re.search(r"(\d+) (?:of|/) ?(\d+)", text.lower())
        count = re.search(r"(?:num.layers|layers|block)\D{0,3}(\d+)|(\d+) layers", text.lower())
        frac = 1.0
        if share:
            frac = int(share[1]) / max(1, int(share[2]))
        elif count and "uniform" not in tokens:  # uniform: the layers of a group, all of which are recomputed
            frac = int(count[1] or count[2]) / stage_layers
        return Recomputation(kind=Recompute.full, layers_frac=min(1.0, frac))
    if parts or tokens & _SELECTIVE:
        return Recomputation(kind=Recompute.selective, parts=frozenset(parts) or frozenset({Recomputed.core_attn}))
    raise Refusal(f"recompute is {text[:60]!r}: what is computed again is not clear")
