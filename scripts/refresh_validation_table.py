"""Rewrite the table in docs/cost-model.md of the cost model's errors from the real `mosaic validate --json`."""

import json
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cost-model.md"
BEGIN, END = "<!-- validation table: scripts/refresh_validation_table.py -->", "<!-- end of validation table -->"
# file -> (time target, memory target), percent
TARGETS = {
    "korthikanti2022_table5": (3, None), "vtrain_multi_node_a100": (8, None), "vtrain_single_node_a100": (15, None),
    "simumax_b200": (6, 3), "mimo_vlm_h100": (8, 8), "megatron_bridge_perf": (12, None),
    "megatron_ci_golden": (None, 8),
}  # fmt: skip
FORMATS = {"megatron_bridge_perf": ("bf16", "fp8")}  # what a file's target is about, where that is not all of it


def main() -> None:
    command = [sys.executable, "-m", "megatron_mosaic.cli", "validate", "--json"]
    files = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["files"]
    lines = [
        "| file | rows | predicted | time, in-sample | time, out of sample | bias | memory, mean (median) | target |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for name, report in files.items():
        memory = f"{_percent(report['memory_mape'])} ({_percent(report['memory_median'])})"
        cells = [
            name, report["rows"], report["predicted"], _percent(report["time_mape"]),
            _percent(report["time_mape_out_of_sample"]), _percent(report["time_bias"]),
            memory if report["memory_mape"] is not None else "-", _verdict(name, report),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _verdict(name: str, report: dict) -> str:
    time, memory = TARGETS.get(name, (None, None))
    words = []
    error, of = report["time_mape_out_of_sample"], ""
    if name in FORMATS:
        counts, errors = report["timed_by_format"], report["time_mape_out_of_sample_by_format"]
        error = sum(counts[each] * errors[each] for each in FORMATS[name]) / sum(counts[each] for each in FORMATS[name])
        of = f" of {' and '.join(FORMATS[name])} rows {_percent(error)}"
    for what, target, value in (
        (f"time{of}", time, error),
        ("memory", memory, report["memory_median" if name == "megatron_ci_golden" else "memory_mape"]),
    ):
        if target is not None and value is not None:
            words.append(f"{what}, target {target} %: {'met' if 100 * value <= target else 'missed'}")
    return "; ".join(words)


if __name__ == "__main__":
    main()
