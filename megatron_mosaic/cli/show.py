"""`mosaic show`: a plan for people. Needs no profile: nothing here is a prediction of time."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import yaml

from megatron_mosaic.cli.output import print_json, print_note, print_table
from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cli.waves import show_waves
from megatron_mosaic.cost_model.effects.memory import Memory, precision_of
from megatron_mosaic.cost_model.simulate import estimate_memory
from megatron_mosaic.parallel_state_ext.group_list import list_groups
from megatron_mosaic.plan import Plan, RankSet, validate_plan
from megatron_mosaic.plan.plan_file import format_plan, load_plan
from megatron_mosaic.plan.tasks.wave_file import is_waves_file
from megatron_mosaic.plan.training import Sharding, TrainingSection, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import build_schedule
from megatron_mosaic.schedules.rank_classes import RankClass, rank_classes
from megatron_mosaic.schedules.text import format_schedule
from megatron_mosaic.units import format_bytes, format_seconds

AXES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")
_ALWAYS = ("tp", "pp", "dp")  # shown even if 1 everywhere
_MOST_LISTED = 2048  # ranks of a plan whose process groups are counted: there are dozens for each rank
_MOST_SPANS = 8  # of a set of ranks, in a table


def main(arguments: argparse.Namespace) -> int:
    """Modules, rank map, schedule, memory of ranks."""
    if is_waves_file(arguments.plan):
        return show_waves(arguments)
    planned = apply_overrides(load_plan(arguments.plan), arguments.overrides)
    plan, workload, setup = planned.plan, planned.workload, planned.setup
    validate_plan(plan, workload, planned.cluster)
    schedule = format_schedule(build_schedule(plan, workload))
    memory = estimate_memory(plan, workload, setup) if setup else {}
    units = plan.units(workload.backbone.name)
    groups = _count_groups(plan, workload)
    for note in planned.notes:
        print_note(note)
    if setup is None:
        print_note(
            "memory is left out: neither the plan nor the command line says how it is trained; "
            "add workload.training.format=bf16 (fp32 on CPUs)"
        )
    if arguments.json:
        said = yaml.safe_load(format_plan(plan))
        print_json(
            {
                "modules": {name: _module(plan, name, units[name]) for name in plan.modules},
                "cluster": said.get("cluster"),
                "training": said.get("training"),
                "rank_map": {str(alike.ranks): _modules_of(alike) for alike in all_classes(plan)},
                "schedule": schedule,
                "peak_bytes": {str(ranks.first): held.total for ranks, held in memory.items()},
                "precision": precision_of(setup).name if setup else None,
                "memory": {str(ranks): asdict(held) for ranks, held in memory.items()},
                "groups": groups,
            }
        )
        return 0
    _print_modules(plan, workload)
    print(render_rank_map(plan, memory))
    print()
    if setup:
        print_memory(_describe(setup), memory)
    print(f"groups: {groups['created']} created, {groups['asked']} asked for" if groups else "groups: not counted")
    print()
    print(schedule, end="")
    return 0


def _count_groups(plan: Plan, workload: Workload) -> dict[str, int] | None:
    """Process groups of the plan; None where the plan is too large to list them."""
    if plan.world_size > _MOST_LISTED:
        return None
    asked = list_groups(plan, workload.edge_pairs)
    return {"created": len(set(asked)), "asked": len(asked)}


def all_classes(plan: Plan) -> tuple[RankClass, ...]:
    """Ranks with the same lanes, and those without any; by their lowest rank."""
    found = rank_classes(plan)
    idle, before = [], 0
    for first, stop in sorted(span for alike in found for span in alike.ranks.spans):
        if first > before:
            idle.append((before, first))
        before = stop
    if before < plan.world_size:
        idle.append((before, plan.world_size))
    rest = (RankClass(ranks=RankSet(tuple(idle)), lanes=()),) if idle else ()
    return tuple(sorted((*found, *rest), key=lambda alike: alike.ranks.first))


def _modules_of(alike: RankClass) -> list[str]:
    return [lane.rpartition(".")[0] for lane in alike.lanes]


def _describe(setup: TrainingSetup) -> str:
    sharded = "no optimizer sharding" if setup.sharding is Sharding.none else f"sharding: {setup.sharding}"
    return f"{precision_of(setup).name}, {sharded}"


def _describe_cluster(plan: Plan) -> str:
    """Its name; of this machine, where it was measured."""
    said = plan.cluster
    if isinstance(said, str):
        return said or "not said"
    if "name" in said:
        return f"{said['name']}, changed"
    return f"{said['num_ranks']} ranks of this machine, {said.get('profile', 'no profile')}"


def _describe_training(plan: Plan) -> str:
    if plan.training is None:
        return "not said"
    usual = TrainingSetup()
    said = {key: getattr(plan.training, key) for key in TrainingSection.model_fields}
    overlaps = [f"{k} {v:g}" for k, v in said.items() if k.endswith("_frac") and v != getattr(usual, k)]
    return ", ".join([plan.training.format, f"sharding {plan.training.sharding}", *overlaps])


def _shorten(ranks: RankSet) -> str:
    """The ranks as text; of many spans, the first."""
    if len(ranks.spans) <= _MOST_SPANS:
        return str(ranks)
    return f"{RankSet(ranks.spans[: _MOST_SPANS - 1])},... ({len(ranks)} ranks)"


def print_memory(assumed: str, memory: Mapping[RankSet, Memory]) -> None:
    """A row for each set of ranks, a column for whatever holds bytes somewhere."""
    columns = [name for name in Memory.__slots__ if any(getattr(held, name) for held in memory.values())]
    rows = [
        (_shorten(ranks), *(format_bytes(getattr(held, name)) for name in columns), format_bytes(held.total))
        for ranks, held in memory.items()
    ]
    print_table(f"memory of a rank, at its peak ({assumed})", ("ranks", *columns, "total"), rows)


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
                _shorten(placed.ranks),
                *(str(getattr(placed.layout, axis)) for axis in axes),
                *(column[i] for column in more.values()),
                f"{placed.quota.share:g}",
                placed.recompute.value,
            )
            for i, (name, placed) in enumerate(plan.modules.items())
        ],
    )
    if plan.cluster or plan.training:
        print(f"cluster: {_describe_cluster(plan)}; training: {_describe_training(plan)}")
    if plan.predicted:
        print(
            f"predicted: step {format_seconds(plan.predicted.step_s)}, peak {format_bytes(plan.predicted.peak_bytes)}"
            f" ({plan.predicted.cost_model})"
        )


def render_rank_map(plan: Plan, memory: Mapping[RankSet, Memory]) -> str:
    """One line for each set of ranks that hold the same: the lane of each module, and the memory of a rank.

    ranks 0-3 | vision.0  llm.0  .          | 1.20 GB
    ranks 4-7 | vision.0  .      generator.0| 0.90 GB
    """
    classes = all_classes(plan)
    names = [f"rank{'s' if len(alike.ranks) > 1 else ''} {_shorten(alike.ranks)}" for alike in classes]
    rows = [[_lane_of(name, alike.lanes) for name in plan.modules] for alike in classes]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, alike, row in zip(names, classes, rows):
        line = f"{name:<{max(map(len, names))}} | {'  '.join(map(str.ljust, row, widths))}"
        held = memory.get(alike.ranks, Memory()).total
        lines.append(f"{line} | {format_bytes(held)}" if memory else line.rstrip())
    return "\n".join(lines)


def _lane_of(module: str, lanes: Iterable[str]) -> str:
    return next((lane for lane in lanes if lane.rpartition(".")[0] == module), ".")
