"""`mosaic show`: a plan for people. Needs no profile: nothing here is a prediction of time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_mosaic.cli.output import print_json, print_table
from megatron_mosaic.config import load_workload
from megatron_mosaic.cost_model.effects.memory import Memory, precision_of
from megatron_mosaic.cost_model.simulate import estimate_memory
from megatron_mosaic.parallel_state_ext.group_list import list_groups
from megatron_mosaic.plan import Plan, RankSet, validate_plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.training import DEFAULT_SETUP, Format, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import build_schedule
from megatron_mosaic.schedules.passes import stage_ranks
from megatron_mosaic.schedules.text import format_schedule
from megatron_mosaic.units import format_bytes, format_seconds

AXES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")
_ALWAYS = ("tp", "pp", "dp")  # shown even if 1 everywhere


def main(arguments: argparse.Namespace) -> int:
    """Modules, rank map, schedule, memory per rank."""
    plan = load_plan(arguments.plan)
    workload = load_workload([f"model={plan.workload}", f"workload.global_batch_size={plan.global_batch_size}"])
    validate_plan(plan, workload)
    schedule = format_schedule(build_schedule(plan, workload))
    setup = plan.training or _guess_setup(plan)
    precision = precision_of(setup)
    found = estimate_memory(plan, workload, setup)
    memory = dict(sorted((rank, held) for ranks, held in found.items() for rank in ranks))
    peaks = {rank: held.total for rank, held in memory.items()}
    units = plan.units(workload.backbone.name)
    asked = list_groups(plan, workload.edge_pairs)
    groups = {"created": len(set(asked)), "asked": len(asked)}
    if arguments.json:
        print_json(
            {
                "modules": {name: _module(plan, name, units[name]) for name in plan.modules},
                "rank_map": {str(rank): list(lanes) for rank, lanes in lanes_of_ranks(plan).items()},
                "schedule": schedule,
                "peak_bytes": {str(rank): num_bytes for rank, num_bytes in peaks.items()},
                "precision": precision.name,
                "memory": {str(ranks): asdict(held) for ranks, held in ranks_of(memory).items()},
                "groups": groups,
            }
        )
        return 0
    _print_modules(plan, workload)
    print(render_rank_map(plan, peaks))
    print()
    print_memory(f"{precision.name}, no optimizer sharding", ranks_of(memory))
    print(f"groups: {groups['created']} created, {groups['asked']} asked for")
    print()
    print(schedule, end="")
    return 0


def _guess_setup(plan: Plan) -> TrainingSetup:
    """Of a plan that does not say it: bf16 if it was made for GPUs, else fp32, the CPU runtime's."""
    on_gpus = plan.predicted is not None and plan.predicted.cost_model.endswith("analytic")
    return DEFAULT_SETUP if on_gpus else TrainingSetup(format=Format.fp32)


def ranks_of(memory: Mapping[int, Memory]) -> dict[RankSet, Memory]:
    """Ranks that hold the same -> what they hold."""
    members: dict[Memory, list[int]] = {}
    for rank, held in memory.items():
        members.setdefault(held, []).append(rank)
    return {RankSet.of(ranks): held for held, ranks in members.items()}


def print_memory(assumed: str, memory: Mapping[RankSet, Memory]) -> None:
    """A row for each set of ranks, a column for whatever holds bytes somewhere."""
    columns = [name for name in Memory.__slots__ if any(getattr(held, name) for held in memory.values())]
    rows = [
        (str(ranks), *(format_bytes(getattr(held, name)) for name in columns), format_bytes(held.total))
        for ranks, held in memory.items()
    ]
    print_table(f"memory of a rank, at its peak ({assumed})", ("ranks", *columns, "total"), rows)


def lanes_of_ranks(plan: Plan) -> dict[int, dict[str, str]]:
    """Rank -> module -> its lane there, in the plan's order of modules."""
    lanes: dict[int, dict[str, str]] = {rank: {} for rank in range(plan.world_size)}
    for name, placed in plan.modules.items():
        for stage in range(placed.layout.pp):
            for rank in stage_ranks(plan, name, stage):
                lanes[rank][name] = f"{name}.{stage}"
    return lanes


def _module(plan: Plan, name: str, unit: int) -> dict[str, Any]:
    placed = plan.modules[name]
    layout = {axis: getattr(placed.layout, axis) for axis in AXES}
    return {
        "ranks": str(placed.ranks),
        "layout": layout,
        "quota": placed.quota.share,
        "unit": unit,
        "sequence_parallel": placed.sequence_parallel,
        "recompute": placed.recompute.value,
    }


def _print_modules(plan: Plan, workload: Workload) -> None:
    microbatches = plan.num_microbatches(workload.backbone.name)
    layouts = [placed.layout for placed in plan.modules.values()]
    axes = [axis for axis in AXES if axis in _ALWAYS or any(getattr(layout, axis) > 1 for layout in layouts)]
    more = {
        "unit": [str(unit) for unit in plan.units(workload.backbone.name).values()],
        "sp": ["yes" if placed.sequence_parallel else "no" for placed in plan.modules.values()],
    }
    more = {key: column for key, column in more.items() if set(column) - {"1", "no"}}
    print_table(
        f"{plan.workload}: {plan.world_size} ranks, {plan.global_batch_size} samples a step, micro-batch "
        f"{plan.micro_batch_size}, {microbatches} microbatches, schedule {plan.schedule}",
        ("module", "ranks", *axes, *more, "share", "recompute"),
        [
            (
                name,
                str(placed.ranks),
                *(str(getattr(placed.layout, axis)) for axis in axes),
                *(column[i] for column in more.values()),
                f"{placed.quota.share:g}",
                placed.recompute.value,
            )
            for i, (name, placed) in enumerate(plan.modules.items())
        ],
    )
    if plan.predicted:
        print(
            f"predicted: step {format_seconds(plan.predicted.step_s)}, peak {format_bytes(plan.predicted.peak_bytes)}"
            f" ({plan.predicted.cost_model})"
        )


def render_rank_map(plan: Plan, peaks: dict[int, float]) -> str:
    """One line for each run of ranks that hold the same: the lane of each module, and the memory of a rank.

    ranks 0-3 | vision.0  llm.0  .          | 1.20 GB
    ranks 4-7 | vision.0  .      generator.0| 0.90 GB
    """
    rows = {
        rank: (*(lanes.get(name, ".") for name in plan.modules), format_bytes(peaks.get(rank, 0.0)))
        for rank, lanes in lanes_of_ranks(plan).items()
    }
    runs: list[tuple[int, int]] = []
    for rank, row in rows.items():
        if runs and rows[runs[-1][1]] == row:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    names = [f"ranks {first}-{last}" if last > first else f"rank {first}" for first, last in runs]
    width = max(map(len, names))
    columns = [max(len(rows[first][i]) for first, _ in runs) for i in range(len(plan.modules))]
    return "\n".join(
        f"{name:<{width}} | {'  '.join(c.ljust(w) for c, w in zip(rows[first], columns))} | {rows[first][-1]}"
        for name, (first, _) in zip(names, runs)
    )
