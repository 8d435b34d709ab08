"""Rewrite the table in docs/cost-model.md of the cost model's errors from the real `mosaic validate --json`."""

import json
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cost-model.md"
BEGIN, END = "<!-- validation table: scripts/refresh_validation_table.py -->", "<!-- end of validation table -->"
# file -> (time target, memory target), percent
TARGETS = {
    "korthikanti2022_table5": (3, None), "vtrain_multi_node_a100": (7, None), "vtrain_single_node_a100": (8, None),
    "simumax_b200": (5, 3), "mimo_vlm_h100": (8, 6), "megatron_ci_golden": (None, 8),
}  # fmt: skip
KINDS = {"megatron_bridge_perf": {"dense": 12, "experts": 14}, "simumax_b200": {"dense": 5, "experts": 5}}
REGRETS = {"vtrain_multi_node_a100": (5, 20), "vtrain_single_node_a100": (1.5, 15)}  # mean, worst


def main() -> None:
    command = [sys.executable, "-m", "megatron_mosaic.cli", "validate", "--json"]
    files = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["files"]
    lines = [
        "| file | rows | predicted | time, in-sample | time, out of sample | bias | memory, mean (median) "
        "| layouts: groups, regret mean (worst), rank correlation | target |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for name, report in files.items():
        memory = f"{_percent(report['memory_mape'])} ({_percent(report['memory_median'])})"
        regret = "-"
        if groups := report["layout_groups"]:
            worst, order = _percent(report["regret_worst"]), report["rank_correlation"]
            regret = f"{groups}, {_percent(report['regret_mean'])} ({worst}), {order:.2f}"
        cells = [
            name, report["rows"], report["predicted"], _percent(report["time_mape"]),
            _percent(report["time_mape_out_of_sample"]), _percent(report["time_bias"]),
            memory if report["memory_mape"] is not None else "-",
            regret, "; ".join(_verdicts(name, report)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _verdicts(name: str, report: dict) -> list[str]:
    time, memory = TARGETS.get(name, (None, None))
    checks = [("time", time, report["time_mape_out_of_sample"]), ("memory", memory, report["memory_mape"])]
    for kind, target in KINDS.get(name, {}).items():
        error = report["by_kind"][kind]["time_mape_out_of_sample"]
        checks.append((f"{kind} {_percent(error)}", target, error))
    for what, target in zip(("mean", "worst"), REGRETS.get(name, ())):
        checks.append((f"regret {what}", target, report[f"regret_{what}"]))
    return [
        f"{what}, target {target} %: {'met' if 100 * value <= target else 'missed'}"
        for what, target, value in checks
        if target is not None and value is not None
    ]


if __name__ == "__main__":
    main()
