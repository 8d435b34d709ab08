"""Korthikanti et al. 2022, figure 1: bytes of parameters with optimizer, and of activations, against the model's.

The figure counts a stage of layers only: no embedding, no logits. 18 bytes a parameter. The first
stage keeps the activations of p microbatches, x 1 + (p - 1) / (p v) when interleaved; configurations as in table 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.cost_model.memory import BF16, stage_parts
from megatron_mosaic.cost_model.profile import Part
from megatron_mosaic.cost_model.published_rows import Case, load_rows, try_case
from megatron_mosaic.cost_model.sizes import count_activation_bytes, count_parameters

_FIRST_WORD = {
    "megatron-22B": "Megatron 22B",
    "gpt3-175B": "GPT-3 175B",
    "turing-530B": "MT-NLG 530B",
    "megatron-1T": "Megatron 1T",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One bar of the figure, as fractions of error."""

    model: str
    mode: str
    static_error_frac: float
    activation_error_frac: float


def compare_memory(folder: Path) -> tuple[MemoryRow, ...]:
    """Errors of the rows that state bytes; nothing where the folder lacks the two tables."""
    table, cases = folder / "korthikanti2022_memory.csv", folder / "korthikanti2022_table5.csv"
    if not (table.exists() and cases.exists()):
        return ()
    built = {row["model"]: try_case(row) for row in load_rows(cases)}
    known = {model: case for model, case in built.items() if isinstance(case, Case)}
    found = []
    for row in load_rows(table):
        case: Case | None = known.get(_FIRST_WORD.get(row["model"], ""))
        if case is None or not row["activation_gib_per_gpu"]:
            continue
        module, placed = case.workload.backbone, case.plan.modules["llm"]
        layout, layers = placed.layout, stage_parts(module, placed, 0)[Part.layer]
        selective = "selective" in row["mode"]
        each = count_activation_bytes(
            module,
            Part.layer,
            layout.tp,
            value_bytes=2,
            fused_attention=selective,
            split="seq" in row["mode"],
            dropout=True,
        )
        more = 1 + (layout.pp - 1) / (layout.pp * layout.vpp) if layout.vpp > 1 else 1.0
        activation = more * layers * layout.pp * case.plan.micro_batch_size * each
        static = BF16.trained_bytes * layers * count_parameters(module, Part.layer, layout.tp)
        found.append(
            MemoryRow(
                model=row["model"],
                mode=row["mode"],
                static_error_frac=static / 2**30 / float(row["params_opt_gib_per_gpu"]) - 1,
                activation_error_frac=activation / 2**30 / float(row["activation_gib_per_gpu"]) - 1,
            )
        )
    return tuple(found)
