"""Korthikanti et al. 2022, figure 1: bytes of parameters with optimizer, and of activations, against the model's.

The figure counts a stage of layers only: no embedding, no logits. 18 bytes a parameter. The first
stage keeps the activations of p microbatches, x 1 + (p - 1) / (p v) when interleaved; configurations as in table 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.cost_model.effects.counts import count_activation_bytes, count_parameters
from megatron_mosaic.cost_model.effects.memory import BF16
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.published.cells import parse_measured
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.errors import ConfigError

_FIRST_WORD = {
    "megatron-22B": "Megatron 22B",
    "gpt3-175B": "GPT-3 175B",
    "turing-530B": "MT-NLG 530B",
    "megatron-1T": "Megatron 1T",
}
_STATIC, _ACTIVATION = "params_opt_gib_per_gpu", "activation_gib_per_gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One bar of the figure, as fractions of error."""

    model: str
    mode: str
    static_error_frac: float
    activation_error_frac: float


def compare_memory(folder: Path) -> tuple[MemoryRow, ...]:
    """Errors of the rows that state bytes; none without the two tables. ConfigError for a bad cell."""
    table, cases = folder / "korthikanti2022_memory.csv", folder / "korthikanti2022_table5.csv"
    if not (table.is_file() and cases.is_file()):
        return ()
    built = {row["model"]: try_case(row) for row in load_rows(cases, ("model",))}
    known = {model: case for model, case in built.items() if isinstance(case, Case)}
    found = []
    for position, row in enumerate(load_rows(table, ("model", "mode", _STATIC, _ACTIVATION)), 1):
        case: Case | None = known.get(_FIRST_WORD.get(row["model"], ""))
        if case is None or not row[_ACTIVATION]:
            continue
        published = {
            column: _number(f"{table}: row {position}, {column}", row[column]) for column in (_STATIC, _ACTIVATION)
        }
        module, placed = case.workload.backbone, case.plan.modules["llm"]
        layout, layers = placed.layout, module.num_layers // placed.layout.pp
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
                static_error_frac=static / 2**30 / published[_STATIC] - 1,
                activation_error_frac=activation / 2**30 / published[_ACTIVATION] - 1,
            )
        )
    return tuple(found)


def _number(where: str, text: str) -> float:
    value = parse_measured(text)
    if value is None:
        raise ConfigError(where, got=repr(text[:40]), expected="a number above 0", fix="correct the cell")
    return value
