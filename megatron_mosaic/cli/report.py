"""`mosaic report`: a plan, its prediction, what a search finds around it and a run of it, as one static page."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mosaic.cli.output import print_json, print_progress, write_text
from megatron_mosaic.cli.planned import apply_overrides, print_notes
from megatron_mosaic.config import Task
from megatron_mosaic.cost_model.model import memory_limit_bytes
from megatron_mosaic.cost_model.simulate import Simulation, simulate
from megatron_mosaic.plan import Plan, validate_plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.report_page.gantt import describe_gantt
from megatron_mosaic.report_page.measured_run import MeasuredRun, describe_run, load_run
from megatron_mosaic.report_page.memory import describe_memory
from megatron_mosaic.report_page.page import render_page
from megatron_mosaic.report_page.rank_map import describe_rank_map
from megatron_mosaic.report_page.searched import describe_search
from megatron_mosaic.schedules.plan_match import load_training_schedule
from megatron_mosaic.search.evaluate import Outcome
from megatron_mosaic.search.find import find_plan
from megatron_mosaic.search.greedy import NoFeasiblePlan
from megatron_mosaic.units import format_bytes, format_seconds

SEARCH_S = 20.0  # that the search may take, where `search.time_budget_s` does not say


def main(arguments: argparse.Namespace) -> int:
    """Simulate, search, read the run, write the page."""
    planned = apply_overrides(load_plan(arguments.plan), arguments.overrides)
    task = planned.build_task(arguments.profile)
    validate_plan(planned.plan, task.workload, task.cluster)
    schedule = load_training_schedule(planned.plan, task.workload, arguments.mosaic_schedule)
    run = load_run(Path(arguments.run)) if arguments.run else None
    print_notes(planned, task.profile.title if task.profile else "")
    simulation = simulate(planned.plan, task.cost_model(), schedule)
    sections = describe_plan_page(planned.plan, task, simulation, run)
    if arguments.search:
        print_progress("report: searching")
        sections["search"] = _search(planned.plan, task, simulation)
    out = arguments.out or str(Path(arguments.plan).with_suffix(".html"))
    text = render_page(f"{planned.plan.workload} on {planned.plan.world_size} ranks", sections)
    write_text(out, text)
    if arguments.json:
        print_json({"out": out, "bytes": len(text.encode()), "sections": list(sections)})
    else:
        print(f"page written to {out} ({format_bytes(len(text.encode()))})")
    return 0


def describe_plan_page(plan: Plan, task: Task, simulation: Simulation, run: MeasuredRun | None) -> dict[str, Any]:
    """All sections but the search."""
    backbone = task.workload.backbone.name
    predicted, limit = simulation.timeline(), memory_limit_bytes(task.cluster, task.search.memory_frac)
    measured = run.timeline if run else None
    facts = {
        "predicted step": format_seconds(simulation.step_s),
        **({"measured step": format_seconds(measured.end_s)} if measured else {}),
        "samples/s": f"{simulation.price.work.num_samples / simulation.step_s:.4g}",
        "bubbles": f"{predicted.bubble_frac:.0%}",
        "peak of a rank": format_bytes(simulation.peak_bytes),
        "may be filled": format_bytes(limit),
        "schedule": str(plan.schedule),
        "microbatches": f"{plan.num_microbatches(backbone)} of {plan.micro_batch_size} samples",
        "cluster": f"{task.cluster.name}, {task.cluster.num_nodes} x {task.cluster.gpus_per_node}",
        "cost model": simulation.price.source.name,
    }
    sections: dict[str, Any] = {
        "facts": facts,
        "rank_map": describe_rank_map(plan, simulation, backbone),
        "gantt": describe_gantt(
            predicted, measured, plan.tracks(backbone), [each.ranks for each in simulation.price.work.classes]
        ),
        "memory": describe_memory(simulation, limit, task.cluster.gpu.memory_bytes),
    }
    return sections | ({"run": describe_run(run, predicted)} if run else {})


def _search(plan: Plan, task: Task, simulation: Simulation) -> dict[str, Any]:
    """What a search finds around the plan, or why it finds nothing."""
    config = task.search
    if config.algorithm == "greedy" and not config.time_budget_s:
        config = replace(config, time_budget_s=SEARCH_S)
    outcome = Outcome(step_s=simulation.step_s, peak_bytes=simulation.peak_bytes)
    try:
        result = find_plan(task.cost_model(), config)
    except NoFeasiblePlan as error:
        return {"none": f"{error.got}; expected {error.expected}"}
    bare = replace(plan, cluster="", training=None)  # as plans of a search are
    return describe_search(result, bare, outcome, memory_limit_bytes(task.cluster, config.memory_frac))
