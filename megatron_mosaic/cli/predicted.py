"""What a command predicts of a run, for the run's ranks to say beside what they measure."""

from __future__ import annotations

from megatron_mosaic.config import Task
from megatron_mosaic.cost_model.efficiency.mfu import step_flops_and_peak
from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.flags.command_line import CommandLine
from megatron_mosaic.runtime.telemetry.prediction import Prediction

_NOT_PRICED = ("swiglu", "quick_geglu", "group_query_attention", "kv_channels")


def list_unpriced(line: CommandLine) -> tuple[str, ...]:
    """Flags that change layers in a way that no workload says: the cost model knows nothing of them."""
    changed = [dest for dest in _NOT_PRICED if line.typed.get(dest, line.defaults[dest]) != line.defaults[dest]]
    return tuple(f"--{dest.replace('_', '-')}" for dest in changed)


def build_prediction(plan: Plan, task: Task, simulation: Simulation) -> Prediction:
    """Of the plan's simulation."""
    step_flops, peak = step_flops_and_peak(plan, task.cost_model())
    return Prediction(
        step_s=simulation.step_s,
        lane_s=simulation.timeline().seconds_by_lane(),
        step_flops=step_flops,
        peak_flops_per_s=peak,
        source=simulation.price.source.name,
    )
