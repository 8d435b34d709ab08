"""`mosaic compare`: the plan beside the best of each family of baselines, on the same cost model."""

from __future__ import annotations

import argparse
import math
from typing import Any

from megatron_mosaic.cli.output import print_json, print_table
from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.efficiency.mfu import estimate_efficiency
from megatron_mosaic.search.baselines import BASELINES, best_baseline
from megatron_mosaic.search.find import find_plan
from megatron_mosaic.units import format_bytes, format_seconds


def main(arguments: argparse.Namespace) -> int:
    """One row a system; the speedup is against the best homogeneous plan (null without one)."""
    task = load_task(arguments.overrides, profile_path=arguments.profile)
    model = task.cost_model()
    result = find_plan(model, task.search)
    plans = {"mosaic": result.plan}
    for name in BASELINES:
        if best := best_baseline(name, result.space, result.evaluator):
            plans[name] = best.plan
    simulations = {name: result.evaluator.simulate(plan) for name, plan in plans.items()}
    base_s = simulations["homogeneous"].step_s if "homogeneous" in simulations else math.nan
    rows: list[dict[str, Any]] = []
    for name in ("mosaic", *BASELINES):
        found = simulations.get(name)
        efficiency = estimate_efficiency(plans[name], found.step_s, model) if found else None
        rows.append(
            {
                "name": name,
                "step_s": found.step_s if found else None,
                "peak_bytes": found.peak_bytes if found else None,
                "feasible": found is not None,
                "mfu": efficiency.mfu_frac if efficiency else None,
                "relative_throughput": efficiency.relative_frac if efficiency else None,
                "speedup": base_s / found.step_s if found and base_s > 0 else None,
            }
        )
    if arguments.json:
        print_json({"rows": rows})
    else:
        print_table(
            f"{task.workload.name} on {task.cluster.name}",
            ("system", "step", "peak", "speedup", "MFU", "of the backbone alone"),
            list(map(_cells, rows)),
        )
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["feasible"]:
        return (row["name"], "no feasible plan", *[""] * 4)
    speedup = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    relative = f"{row['relative_throughput']:.0%}"
    return (row["name"], format_seconds(row["step_s"]), format_bytes(row["peak_bytes"]), speedup, mfu, relative)
