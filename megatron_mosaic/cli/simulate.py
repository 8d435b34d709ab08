"""`mosaic simulate`: the predicted timeline of a plan."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from megatron_mosaic.cli.output import print_json, print_table, write_text
from megatron_mosaic.cli.page import render_page
from megatron_mosaic.cli.show import print_memory
from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Plan, validate_plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.schedules.plan_match import load_training_schedule
from megatron_mosaic.schedules.timeline import Timeline, render_text, to_chrome_trace
from megatron_mosaic.units import format_bytes, format_seconds


def main(arguments: argparse.Namespace) -> int:
    """Simulate one step; write the trace and the page that are asked for."""
    plan = load_plan(arguments.plan)
    task = load_task(complete_overrides(plan, arguments.overrides), profile_path=arguments.profile)
    validate_plan(plan, task.workload, task.cluster)
    schedule = load_training_schedule(plan, task.workload, arguments.mosaic_schedule)
    simulation = simulate(plan, task.cost_model(), schedule)
    timeline = simulation.timeline()
    if arguments.trace:
        write_text(arguments.trace, to_chrome_trace([("predicted", timeline)]))
    if arguments.html:
        write_text(arguments.html, render_page(f"{plan.workload}, predicted", timeline))
    memory = simulation.memory()
    alike = {ranks.first: ranks for ranks in memory}
    if arguments.json:
        print_json(
            {
                "step_s": simulation.step_s,
                "bubble_frac": timeline.bubble_frac,
                "peak_bytes": simulation.peak_bytes,
                "by_module": timeline.seconds_by_module(),
                "memory": {str(ranks): asdict(held) for ranks, held in memory.items()},
            }
        )
        return 0
    print(render_text(Timeline(tuple(span for span in timeline.spans if span.rank in alike))))
    for first, ranks in alike.items():
        if len(ranks) > 1:
            print(f"ranks {ranks} do the same as rank {first}")
    print()
    source = simulation.price.source
    print_table(
        f"step {format_seconds(simulation.step_s)}, bubbles {timeline.bubble_frac:.0%}, "
        f"peak {format_bytes(simulation.peak_bytes)} a rank ({source.name})",
        ("module", "busy, mean over its ranks"),
        [(module, format_seconds(seconds)) for module, seconds in timeline.seconds_by_module().items()],
    )
    print_memory(f"{source.precision.name}, sharding: {source.setup.sharding}", memory)
    return 0


def complete_overrides(plan: Plan, overrides: list[str]) -> list[str]:
    """The user's overrides after what the plan implies: its model, its batch, and this machine with its ranks."""
    given = {word.lstrip("+").partition("=")[0] for word in overrides}
    implied = {"model": plan.workload, "workload.global_batch_size": plan.global_batch_size}
    if "cluster" not in given:
        implied |= {"cluster": "local", "cluster.num_ranks": plan.world_size}
    return [f"{key}={value}" for key, value in implied.items() if key not in given] + overrides
