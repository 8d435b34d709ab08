"""`mosaic plan`: search, explain, write."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import yaml

from megatron_mosaic.cli.output import Progress, print_json, print_table, write_text
from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cli.predicted import build_prediction
from megatron_mosaic.cli.waves import plan_waves
from megatron_mosaic.config import Task, load_task
from megatron_mosaic.cost_model.efficiency.mfu import Efficiency, estimate_efficiency
from megatron_mosaic.cost_model.model import memory_limit_bytes
from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.errors import MosaicError
from megatron_mosaic.plan import Plan, validate_plan
from megatron_mosaic.plan.plan_file import format_plan, load_plan, save_plan
from megatron_mosaic.runtime.telemetry.prediction import format_prediction
from megatron_mosaic.search.find import SearchResult, find_plan, first_step
from megatron_mosaic.search.greedy import NoFeasiblePlan
from megatron_mosaic.search.refused.remedies import Words, find_remedy
from megatron_mosaic.search.space import Space
from megatron_mosaic.units import format_bytes, format_seconds


def main(arguments: argparse.Namespace) -> int:
    """Find the plan, write it, report it."""
    budget = [f"search.time_budget_s={arguments.time_budget}"] if arguments.time_budget else []

    def load(*words: str) -> Task:
        """The task with more words."""
        overrides = [*arguments.overrides, *budget, *words]
        if arguments.like:
            return apply_overrides(load_plan(arguments.like), overrides).build_task(arguments.profile)
        return load_task(overrides, profile_path=arguments.profile)

    task = load()
    if task.workload.tasks:
        return plan_waves(arguments, task)
    plan, result = search_plan(task, load)
    efficiency = estimate_efficiency(plan, result.simulation.step_s, task.cost_model())
    if arguments.out:
        save_plan(plan, arguments.out)
    if arguments.predicted:
        write_text(arguments.predicted, format_prediction(build_prediction(plan, task, result.simulation)))
    fits = task.fits(result.simulation.peak_bytes)
    if arguments.json:
        report = _as_json(plan, result, arguments.out)
        print_json(report | {"predicted": report["predicted"] | efficiency.as_dict(), "fits": fits})
    else:
        _print(plan, result, arguments.out, efficiency)
    return 0 if fits else 1


def search_plan(task: Task, load: Callable[..., Task]) -> tuple[Plan, SearchResult]:
    """The best plan that the search finds, with cluster and training, and how it was found. NoFeasiblePlan with the
    words that help, where some do; `load` makes the task with more words."""
    progress = Progress()
    try:
        result = find_plan(
            task.cost_model(),
            task.search,
            progress=lambda step: progress(f"{format_seconds(step.step_s):>9}  {step.reason}"),
            heartbeat=lambda evaluated: progress.beat(f"{evaluated} plans priced"),
        )
    except NoFeasiblePlan as none:
        raise _with_remedy(none, task, load, progress) from none
    plan = task.complete(result.plan)
    validate_plan(plan, task.workload, task.cluster)
    return plan, result


def _with_remedy(none: NoFeasiblePlan, task: Task, load: Callable[..., Task], progress: Progress) -> NoFeasiblePlan:
    if none.miss is None:
        return none

    def step_s(words: Words) -> float:
        progress(f"no plan fits; trying {' '.join(words)}")
        try:
            other = load(*words)
            first = first_step(other.cost_model(), other.search)
        except MosaicError:  # words that make no task, or one that nobody measured: no help, and not what was asked
            return math.inf
        return first.step_s if first else math.inf

    space = Space(workload=task.workload, cluster=task.cluster, config=task.search)
    remedy = find_remedy(space, none.miss, memory_limit_bytes(task.cluster, task.search.memory_frac), step_s)
    return none.with_remedy(remedy) if remedy else none


def predict(simulation: Simulation) -> dict[str, float]:
    """The prediction's numbers, as `--json` prints them."""
    return {
        "step_s": simulation.step_s,
        "bubble_frac": simulation.timeline().bubble_frac,
        "peak_bytes": simulation.peak_bytes,
        "samples_per_s": simulation.price.work.num_samples / simulation.step_s,
    }


def _as_json(plan: Plan, result: SearchResult, out: str | None) -> dict[str, Any]:
    return {
        "plan": yaml.safe_load(format_plan(plan)),
        "out": out,
        "predicted": predict(result.simulation),
        "steps": [{"step_s": step.step_s, "reason": step.reason} for step in result.steps],
        "search_s": result.search_s,
        "evaluated": result.evaluated,
    }


def _print(plan: Plan, result: SearchResult, out: str | None, efficiency: Efficiency) -> None:
    print_table(
        f"search: {result.evaluated} plans in {format_seconds(result.search_s)}",
        ("move", "step"),
        [(step.reason, format_seconds(step.step_s)) for step in result.steps],
    )
    numbers = predict(result.simulation)
    print(
        f"predicted: step {format_seconds(numbers['step_s'])}, {numbers['samples_per_s']:.4g} samples/s, "
        f"bubbles {numbers['bubble_frac']:.0%}, peak {format_bytes(numbers['peak_bytes'])} a rank\n"
        f"{efficiency}\n"
        f"cost model: {result.simulation.price.source.name}"
    )
    if result.simulation.interference:
        print(f"modules beside each other slow each other down: {result.simulation.interference}")
    print(f"plan written to {out}" if out else f"\n{format_plan(plan)}", end="\n" if out else "")
