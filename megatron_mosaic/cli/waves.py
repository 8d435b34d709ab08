"""`plan`, `compare`, `show` and `simulate` for several tasks: plans in waves in the place of plans of modules."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import yaml

from megatron_mosaic.cli.output import print_json, print_table, write_text
from megatron_mosaic.cli.planned import apply_to_waves, print_notes
from megatron_mosaic.config import Task
from megatron_mosaic.cost_model.effects.memory import Memory
from megatron_mosaic.cost_model.waves.step import WaveClock, WaveStep
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import RankSet
from megatron_mosaic.plan.tasks.wave_file import format_waves, load_waves
from megatron_mosaic.plan.tasks.waves import WavePlan, validate_waves
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.search.spindle.families import FAMILIES
from megatron_mosaic.search.spindle.find import Found, WaveSearch, find_waves
from megatron_mosaic.units import format_bytes, format_seconds

_BASE = "modules_in_turn"  # what speedups are against


def plan_waves(arguments: argparse.Namespace, task: Task) -> int:
    """Search, explain, write."""
    _refuse_flags(arguments, ("predicted",), "lanes, whose seconds a run would say beside what it measures")
    result = _search(task)
    family, found = result.best
    cluster, training = task.said
    plan = replace(found.plan, cluster=cluster, training=training)
    if arguments.out:
        write_text(arguments.out, format_waves(plan))
    if arguments.json:
        print_json(
            {
                "plan": yaml.safe_load(format_waves(plan)),
                "out": arguments.out,
                "family": family,
                "predicted": _predict(found.step, plan),
                "relaxed_optimum_s": found.best_s,
                "steps": _rows(result),
                "search_s": result.search_s,
                "evaluated": result.evaluated,
                "fits": True,
            }
        )
        return 0
    _print_families(result, f"search: {result.evaluated} plans in {format_seconds(result.search_s)}")
    _print_step(found.step, plan, task.cost_model().name)
    print(f"plan written to {arguments.out}" if arguments.out else f"\n{format_waves(plan)}", end="\n")
    return 0


def compare_waves(arguments: argparse.Namespace, task: Task) -> int:
    """One row a family of plans; the speedup is against modules in turn."""
    result = _search(task)
    if arguments.json:
        print_json({"rows": _rows(result)})
    else:
        _print_families(result, f"{task.workload.name} on {task.cluster.name}")
    return 0


def show_waves(arguments: argparse.Namespace) -> int:
    """Tasks, instances of modules, waves; memory where it is known how it is trained."""
    planned = apply_to_waves(load_waves(arguments.plan), arguments.overrides)
    plan, workload = planned.plan, planned.workload
    validate_waves(plan, workload)
    print_notes(planned)
    known = bool(plan.cluster and plan.training)
    memory = WaveClock(planned.build_task(None).cost_model()).simulate(plan).memory if known else {}
    instances = {module.name: [str(ranks) for ranks in plan.instances(module.name)] for module in workload.modules}
    if arguments.json:
        said = yaml.safe_load(format_waves(plan))
        print_json(
            {
                "modules": instances,
                "tasks": _tasks(workload),
                "cluster": said.get("cluster"),
                "training": said.get("training"),
                "rank_map": _rank_map(plan),
                "waves": said["waves"],
                "peak_bytes": {str(rank): held.total for rank, held in memory.items()},
            }
        )
        return 0
    rows = [(t["task"], str(t["samples"]), t["modules"], t["edges"] or "-", t["loss"]) for t in _tasks(workload)]
    title = f"{plan.workload}: {plan.world_size} ranks, {plan.global_batch_size} samples a step, in waves"
    print_table(title, ("task", "samples", "modules", "edges", "loss"), rows)
    print_table("instances", ("module", "ranks"), [(name, "  ".join(sets)) for name, sets in instances.items()])
    print(render_waves(plan))
    if memory:
        worst = max(memory, key=lambda rank: memory[rank].total)
        print(f"\npeak {format_bytes(memory[worst].total)}, on rank {worst}")
    return 0


def simulate_waves(arguments: argparse.Namespace) -> int:
    """The predicted step. 1 if a rank needs more memory than it has."""
    _refuse_flags(arguments, ("trace", "html", "mosaic_schedule"), "schedule of lanes")
    planned = apply_to_waves(load_waves(arguments.plan), arguments.overrides)
    plan, task = planned.plan, planned.build_task(arguments.profile)
    validate_waves(plan, task.workload)
    print_notes(planned)
    step = WaveClock(task.cost_model()).simulate(plan)
    fits = task.fits(step.peak_bytes)
    if arguments.json:
        print_json(
            {
                **_predict(step, plan),
                "fits": fits,
                "by_module": _by_module(step),
                "memory": {str(rank): asdict(held) for rank, held in step.memory.items()},
            }
        )
        return 0 if fits else 1
    _print_step(step, plan, task.cost_model().name)
    rows = [(name, format_seconds(seconds)) for name, seconds in _by_module(step).items()]
    print_table("busy, over all ranks", ("module", "rank-seconds"), rows)
    print(f"fullest rank: {_describe(max(step.memory.values(), key=lambda held: held.total))}")
    if not fits:
        print("does not fit (search.memory_frac)")
    return 0 if fits else 1


def render_waves(plan: WavePlan) -> str:
    """A line for each slice, under its wave."""
    lines = []
    for number, wave in enumerate(plan.waves):
        for each in wave:
            again = "" if each.recompute == "none" else f"  recompute {each.recompute}"
            lines.append(f"wave {number:>2} | ranks {each.ranks!s:<10} {each.layout!s:<10} {each.name}{again}")
    return "\n".join(lines)


def _refuse_flags(arguments: argparse.Namespace, flags: Sequence[str], missing: str) -> None:
    """ConfigError for the first that is given: plans in waves have nothing of the kind."""
    for flag in flags:
        if getattr(arguments, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')}",
                got=getattr(arguments, flag),
                expected=f"a plan of modules: a plan in waves has no {missing}",
                fix="leave it out",
            )


def _search(task: Task) -> WaveSearch:
    if task.profile is not None:
        raise ConfigError(
            "cluster",
            got="local",
            expected="GPUs: a profile of this machine knows nothing of tasks",
            fix="choose another cluster, e.g. cluster=a800_8x8",
        )
    return find_waves(task.cost_model(), task.search)


def _rows(result: WaveSearch) -> list[dict[str, Any]]:
    base = result.families[_BASE]
    return [_row(name, found, base) for name, found in result.families.items()]


def _row(name: str, found: Found | None, base: Found | None) -> dict[str, Any]:
    if found is None:
        keys = "step_s", "bubble_frac", "peak_bytes", "transfer_frac", "num_waves", "speedup"
        return {"name": name, **dict.fromkeys(keys), "feasible": False}
    step = found.step
    return {
        "name": name,
        "step_s": step.step_s,
        "bubble_frac": step.bubble_frac,
        "peak_bytes": step.peak_bytes,
        "transfer_frac": step.transfer_frac,
        "num_waves": len(found.plan.waves),
        "speedup": base.step.step_s / step.step_s if base else None,
        "feasible": True,
    }


def _print_families(result: WaveSearch, title: str) -> None:
    cells = []
    for row in _rows(result):
        if not row["feasible"]:
            cells.append((row["name"], "no plan that fits", *[""] * 6))
            continue
        cells.append(
            (
                row["name"],
                format_seconds(row["step_s"]),
                f"{row['speedup']:.2f}x" if row["speedup"] else "-",
                f"{row['bubble_frac']:.0%}",
                f"{row['transfer_frac']:.1%}",
                format_bytes(row["peak_bytes"]),
                str(row["num_waves"]),
                FAMILIES[row["name"]].source,
            )
        )
    print_table(title, ("family", "step", "speedup", "idle", "transfers", "peak", "waves", "as in"), cells)


def _predict(step: WaveStep, plan: WavePlan) -> dict[str, float]:
    return {
        "step_s": step.step_s,
        "bubble_frac": step.bubble_frac,
        "peak_bytes": step.peak_bytes,
        "samples_per_s": plan.global_batch_size / step.step_s,
        "transfer_frac": step.transfer_frac,
    }


def _print_step(step: WaveStep, plan: WavePlan, source: str) -> None:
    numbers = _predict(step, plan)
    print(
        f"predicted: step {format_seconds(step.step_s)} ({format_seconds(step.forward_s)} forward, "
        f"{format_seconds(step.backward_s)} backward, {format_seconds(step.gradients_s)} gradients and optimizer), "
        f"{numbers['samples_per_s']:.4g} samples/s,\nidle {step.bubble_frac:.0%}, transfers "
        f"{step.transfer_frac:.1%}, peak {format_bytes(step.peak_bytes)} a rank\ncost model: {source}"
    )


def _by_module(step: WaveStep) -> dict[str, float]:
    found: dict[str, float] = {}
    for span in step.spans:
        seconds = (span.end_s - span.start_s) * len(span.each.ranks)
        found[span.each.module] = found.get(span.each.module, 0.0) + seconds
    return found


def _describe(held: Memory) -> str:
    parts = {name: getattr(held, name) for name in Memory.__slots__ if getattr(held, name)}
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def _tasks(workload: Workload) -> list[dict[str, Any]]:
    return [
        {
            "task": task.name,
            "samples": task.samples,
            "modules": " ".join(task.module_names),
            "edges": " ".join(f"{source}->{target}" for source, target in task.edges),
            "loss": f"{task.loss.kind} of {', '.join(task.loss.modules)}",
        }
        for task in workload.tasks
    ]


def _rank_map(plan: WavePlan) -> dict[str, list[str]]:
    """Ranks with the same slices -> those."""
    slices: dict[tuple[str, ...], list[int]] = {}
    for rank in range(plan.world_size):
        mine = tuple(each.name for each in plan.slices if rank in each.ranks)
        slices.setdefault(mine, []).append(rank)
    return {str(RankSet.of(ranks)): list(mine) for mine, ranks in slices.items()}
