"""`mosaic compare`: the plan beside the best of each family of baselines and of each schedule, on one cost model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from megatron_mosaic.cli.output import print_json, print_progress, print_table
from megatron_mosaic.cli.waves import compare_waves
from megatron_mosaic.config import Task, load_task
from megatron_mosaic.cost_model.efficiency.mfu import estimate_efficiency
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules import SCHEDULES
from megatron_mosaic.search.baselines import BASELINES, best_baseline, best_of_schedule
from megatron_mosaic.search.find import SearchResult, find_plan
from megatron_mosaic.units import format_bytes, format_seconds

_COLUMNS = (
    "system",
    "step",
    "bubble",
    "peak",
    "fits",
    "speedup",
    "MFU",
    "of the backbone alone",
    "backbone",
    "micro-batch",
)


def main(arguments: argparse.Namespace) -> int:
    """One row a system, then one a schedule (all modules on all ranks, the backbone a pipeline); the speedup is against
    the best homogeneous plan (null without one)."""
    task = load_task(arguments.overrides, profile_path=arguments.profile)
    if task.workload.tasks:
        return compare_waves(arguments, task)
    model = task.cost_model()
    result = find_plan(model, task.search)
    rows = [_row(name, plan, task, model) for name, plan in _find_plans(result).items()]
    base_s = {row["name"]: row["step_s"] for row in rows}["homogeneous"] or math.nan
    for row in rows:
        row["speedup"] = base_s / row["step_s"] if row["step_s"] and base_s > 0 else None
    if arguments.json:
        print_json({"rows": rows})
    else:
        print_table(
            f"{task.workload.name} on {task.cluster.name}",
            _COLUMNS,
            list(map(_cells, rows)),
        )
    return 0


def _find_plans(result: SearchResult) -> Mapping[str, Plan | None]:
    """Name of a row -> its plan; None where there is none."""
    best = {name: best_baseline(name, result.space, result.evaluator) for name in BASELINES}
    for name in SCHEDULES:
        print_progress(f"compare: schedule {name}")
        best[f"schedule {name}"] = best_of_schedule(name, result.space, result.evaluator)
    return {"mosaic": result.plan} | {name: found.plan if found else None for name, found in best.items()}


def _row(name: str, plan: Plan | None, task: Task, model: CostModel) -> dict[str, Any]:
    if plan is None:
        keys = ["step_s", "bubble_frac", "peak_bytes", "mfu", "relative_throughput", "backbone", "micro_batch_size"]
        return {"name": name, **dict.fromkeys(keys), "fits": False, "feasible": False}
    found = simulate(plan, model)
    fits = task.fits(found.peak_bytes)
    efficiency = estimate_efficiency(plan, found.step_s, model)
    return {
        "name": name,
        "step_s": found.step_s,
        "bubble_frac": found.timeline().bubble_frac,
        "peak_bytes": found.peak_bytes,
        "fits": fits,
        "feasible": fits,
        "mfu": efficiency.mfu_frac,
        "relative_throughput": efficiency.relative_frac,
        "backbone": str(plan.modules[task.workload.backbone.name].layout),
        "micro_batch_size": plan.micro_batch_size,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["step_s"] is None:
        return (row["name"], "no plan", *[""] * 8)
    return (
        row["name"],
        format_seconds(row["step_s"]),
        f"{row['bubble_frac']:.0%}",
        format_bytes(row["peak_bytes"]),
        "yes" if row["fits"] else "no",
        f"{row['speedup']:.2f}x" if row["speedup"] else "-",
        f"{row['mfu']:.1%}",
        f"{row['relative_throughput']:.0%}",
        row["backbone"],
        str(row["micro_batch_size"]),
    )
