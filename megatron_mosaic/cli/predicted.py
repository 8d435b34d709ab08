"""What a command predicts of a run, for the run's ranks to say beside what they measure."""

from __future__ import annotations

from dataclasses import replace

from megatron_mosaic.config import Task
from megatron_mosaic.cost_model.effects.kernels import flops_per_s
from megatron_mosaic.cost_model.efficiency.mfu import count_step_flops
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
    """Of the plan's simulation. A peak of CPUs is what the profile's large product reached."""
    workload = replace(task.workload, global_batch_size=plan.global_batch_size)
    if task.profile is not None:
        peak = task.profile.machine.flops_per_s
    else:
        peak = flops_per_s(task.cluster.gpu, task.setup.format) * plan.world_size
    return Prediction(
        step_s=simulation.step_s,
        lane_s=simulation.timeline().seconds_by_lane(),
        step_flops=count_step_flops(workload),
        peak_flops_per_s=peak,
        source=simulation.price.source.name,
    )
