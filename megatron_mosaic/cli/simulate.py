"""`mosaic simulate`: the predicted timeline of a plan."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from megatron_mosaic.cli.output import print_json, print_progress, print_table, write_text
from megatron_mosaic.cli.planned import apply_overrides, print_notes
from megatron_mosaic.cli.report import describe_plan_page
from megatron_mosaic.cli.show import print_memory
from megatron_mosaic.cli.waves import simulate_waves
from megatron_mosaic.cost_model.efficiency.mfu import estimate_efficiency
from megatron_mosaic.cost_model.model import memory_limit_bytes
from megatron_mosaic.cost_model.simulate import count_memory, simulate
from megatron_mosaic.data_variance.draw import varies
from megatron_mosaic.data_variance.variance import Variance, estimate_variance
from megatron_mosaic.plan import validate_plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.tasks.wave_file import is_waves_file
from megatron_mosaic.report_page.page import render_page
from megatron_mosaic.schedules.plan_match import load_training_schedule
from megatron_mosaic.schedules.views.text import render_text
from megatron_mosaic.schedules.views.trace import TracedStep, to_chrome_trace
from megatron_mosaic.units import format_bytes, format_seconds


def main(arguments: argparse.Namespace) -> int:
    """Simulate one step; write the trace and the page that are asked for. 1 if a rank needs more memory than it has."""
    if is_waves_file(arguments.plan):
        return simulate_waves(arguments)
    planned = apply_overrides(load_plan(arguments.plan), arguments.overrides)
    plan, task = planned.plan, planned.build_task(arguments.profile)
    validate_plan(plan, task.workload, task.cluster)
    schedule = load_training_schedule(plan, task.workload, arguments.mosaic_schedule)
    print_notes(planned, task.profile.title if task.profile else "")
    model = task.cost_model()
    simulation = simulate(plan, model, schedule)
    efficiency = estimate_efficiency(plan, simulation.step_s, model)
    drawn = None
    if arguments.draws and varies(task.workload):
        drawn = estimate_variance(plan, model, schedule, num_batches=arguments.draws, progress=_say_drawn)
    timeline = simulation.timeline()
    if arguments.trace:
        step = TracedStep(title="predicted", timeline=timeline, memory=count_memory(simulation))
        write_text(arguments.trace, to_chrome_trace([step], simulation.program.schedule))
    if arguments.html:
        write_text(
            arguments.html, render_page(f"{plan.workload}, predicted", describe_plan_page(plan, task, simulation, None))
        )
    memory = simulation.memory()
    fits = task.fits(max(simulation.peak_bytes, drawn.peak_bytes.worst if drawn else 0.0))
    if arguments.json:
        print_json(
            {
                "step_s": simulation.step_s,
                "bubble_frac": timeline.bubble_frac,
                "peak_bytes": simulation.peak_bytes,
                "fits": fits,
                "interference": simulation.interference,
                **efficiency.as_dict(),
                **({"drawn": drawn.as_dict()} if drawn else {}),
                "by_module": timeline.seconds_by_module(),
                "memory": {str(ranks): asdict(held) for ranks, held in memory.items()},
            }
        )
        return 0 if fits else 1
    print(render_text(timeline))
    print()
    source = simulation.price.source
    print_table(
        f"step {format_seconds(simulation.step_s)}, bubbles {timeline.bubble_frac:.0%}, "
        f"peak {format_bytes(simulation.peak_bytes)} a rank ({source.name})",
        ("module", "busy, mean over its ranks"),
        [(module, format_seconds(seconds)) for module, seconds in timeline.seconds_by_module().items()],
    )
    print(efficiency)
    if drawn:
        _print_drawn(drawn)
    if simulation.interference:
        print(f"modules beside each other slow each other down: {simulation.interference}")
    print_memory(f"{source.precision.name}, sharding: {source.setup.sharding}", memory)
    if not fits:
        limit_bytes = memory_limit_bytes(task.cluster, task.search.memory_frac)
        print(f"does not fit: {format_bytes(limit_bytes)} of a device may be filled (search.memory_frac)")
    return 0 if fits else 1


def _say_drawn(done: int) -> None:
    if done % 16 == 0:
        print_progress(f"simulate: {done} batches drawn")


def _print_drawn(drawn: Variance) -> None:
    """How step and memory vary with the data."""
    step, peak = drawn.step_s, drawn.peak_bytes
    print_table(
        f"over {drawn.num_batches} batches drawn from the model's histograms",
        ("", "mean", "95 % stay within", "worst"),
        [
            ("step", *[format_seconds(each) for each in (step.mean, step.p95, step.worst)]),
            ("peak of a rank", *[format_bytes(each) for each in (peak.mean, peak.p95, peak.worst)]),
        ],
    )
    busiest = ", ".join(f"{name} {times:.2f}" for name, times in drawn.imbalance.items())
    print(f"load of a unit's busiest replica, of the mean: {busiest}")
