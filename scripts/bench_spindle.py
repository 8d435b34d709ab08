"""Markdown tables: plans in waves for several tasks beside what Spindle published (arXiv 2409.03365, ASPLOS'25).

Speedups over modules in turn, all families on one cost model (analytic, A800); published ones are over DeepSpeed.
How far the waves are above the relaxed optimum C*, and CPU seconds of planning. Rows that placement moves. How speedups
depend on the samples of a task, which the paper does not say. `--quick`: the smallest cluster of each; `--json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.config import Task, load_task
from megatron_mosaic.cost_model.model import memory_limit_bytes
from megatron_mosaic.cost_model.waves.step import WaveClock
from megatron_mosaic.search.spindle.families import FAMILIES
from megatron_mosaic.search.spindle.find import WaveSearch, find_waves, list_choices, price_waves
from megatron_mosaic.search.spindle.metaops import contract
from megatron_mosaic.search.spindle.placement import KEEPING, Placer, Rule
from megatron_mosaic.search.spindle.wavefront import STRATEGIES, schedule_levels

NODE = 8
# (model, GPUs) -> Spindle, DistMM-MT, Spindle-Optimus, over DeepSpeed: bar labels of the paper's figures as far as they
# can be read; QWen-VAL on 32 from its text
PUBLISHED: dict[tuple[str, int], dict[str, float]] = {
    ("multitask_clip_4", 8): {"spindle": 1.21, "tasks_in_turn": 1.09, "marginal_gain": 0.96},
    ("multitask_clip_4", 16): {"spindle": 1.22, "tasks_in_turn": 1.08, "marginal_gain": 1.00},
    ("multitask_clip_4", 32): {"spindle": 1.52, "tasks_in_turn": 1.20, "marginal_gain": 1.36},
    ("multitask_clip_10", 16): {"spindle": 1.33, "tasks_in_turn": 1.08, "marginal_gain": 0.93},
    ("multitask_clip_10", 32): {"spindle": 1.71, "tasks_in_turn": 1.14, "marginal_gain": 1.38},
    ("qwen_val", 32): {"spindle": 1.16},
    ("qwen_val", 64): {"spindle": 1.63, "tasks_in_turn": 1.11, "marginal_gain": 1.44},
}
CELLS = [(name, gpus) for name in ("multitask_clip_4", "multitask_clip_10", "ofasys") for gpus in (8, 16, 32, 64)]
CELLS += [("qwen_val", 32), ("qwen_val", 64)]
# Share of transfers, smart -> sequential, per cent (the paper's ablation)
PUBLISHED_TRANSFERS = {
    ("multitask_clip_10", 8): "3.2 -> 9.7",
    ("multitask_clip_10", 16): "5.7 -> 27",
    ("ofasys", 8): "3.8 -> 10.3",
    ("ofasys", 16): "6.2 -> 20.6",
    ("qwen_val", 32): "1.7 -> 6.1",
    ("qwen_val", 64): "2.5 -> 8.7",
}
SAMPLES = {"multitask_clip_10": (64, 128, 256, 512), "qwen_val": (16, 32, 64)}
SENSITIVE = [("multitask_clip_10", 16), ("multitask_clip_10", 32), ("qwen_val", 32), ("qwen_val", 64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One workload on one cluster."""

    model: str
    gpus: int
    result: WaveSearch
    above_best: float  # length of the shortest waves over C*
    cpu_s: float

    def speedup(self, family: str) -> float | None:
        """Over modules in turn."""
        found, base = self.result.families[family], self.result.families["modules_in_turn"]
        return base.step.step_s / found.step.step_s if found and base else None


def load(model: str, gpus: int, *, samples: int = 0) -> Task:
    """On so many GPUs; with so many samples of each task."""
    words = [f"model={model}", "cluster=a800_8x8", f"cluster.num_nodes={gpus // NODE}"]
    task = load_task(words)
    if samples:
        task = load_task([*words, f"workload.global_batch_size={samples * len(task.workload.tasks)}"])
    return task


def measure(model: str, gpus: int, *, samples: int = 0) -> Cell:
    """Plan it, from nothing priced."""
    task = load(model, gpus, samples=samples)
    began_s = time.process_time()
    result = find_waves(task.cost_model(), task.search)
    cpu_s = time.process_time() - began_s
    ops = _contract(task)[1]
    levels = [schedule_levels(ops, gpus, each) for each in STRATEGIES]
    above = min(each.seconds for each in levels) / levels[0].best_s
    return Cell(model=model, gpus=gpus, result=result, above_best=above, cpu_s=cpu_s)


def _contract(task: Task) -> tuple[Placer, Any, Any]:
    """With the first choice that MetaOps fit with."""
    clock = WaveClock(task.cost_model())
    limit_bytes = memory_limit_bytes(task.cluster, task.search.memory_frac)
    for choice in list_choices(clock, task.search, limit_bytes):
        ops = contract(clock.model, clock.uses, choice, limit_bytes)
        if ops is not None:
            placer = Placer(
                clock=clock,
                recompute=choice.recompute,
                memory_bytes=float("inf"),  # where rows go, whatever fits
                num_ranks=task.cluster.num_ranks,
                gpus_per_node=task.cluster.gpus_per_node,
            )
            return placer, ops, choice
    raise SystemExit(f"{task.workload.name}: nothing fits on {task.cluster.num_ranks} GPUs")


def ablate(model: str, gpus: int) -> dict[str, Any]:
    """The same waves placed in islands (the better of both rules) and in turn."""
    placer, ops, choice = _contract(load(model, gpus))
    found: dict[str, list[Any]] = {"smart": [], "sequential": []}
    for waves in dict.fromkeys(schedule_levels(ops, gpus, each).waves for each in STRATEGIES):
        for rule in (*KEEPING, Rule.in_turn):
            placed = placer.place(waves, rule)
            assert placed is not None, "memory is no limit here"
            step = price_waves(placer.clock, placed, 1.0, choice).step
            found["sequential" if rule is Rule.in_turn else "smart"].append(step)
    best = {name: min(steps, key=lambda step: step.step_s) for name, steps in found.items()}
    return {
        "model": model,
        "gpus": gpus,
        **{f"{name}_transfer_frac": step.transfer_frac for name, step in best.items()},
        **{f"{name}_moved_bytes": step.moved_bytes for name, step in best.items()},
        **{f"{name}_step_s": step.step_s for name, step in best.items()},
    }


def _rows(cells: Sequence[Cell]) -> Iterator[str]:
    yield "| workload | GPUs | Spindle | DistMM-MT | Spindle-Optimus | step | waves over C* | planning |"
    yield "|---|---:|---|---|---|---:|---:|---:|"
    for cell in cells:
        published = PUBLISHED.get((cell.model, cell.gpus), {})
        texts = []
        for family in ("spindle", "tasks_in_turn", "marginal_gain"):
            ours = cell.speedup(family)
            text = "no plan" if ours is None else f"{ours:.2f}x"
            texts.append(text + (f" (published {published[family]:.2f})" if family in published else ""))
        found = cell.result.families["spindle"]
        step = f"{found.step.step_s:.3f} s" if found else "-"
        yield (
            f"| {cell.model} | {cell.gpus} | {' | '.join(texts)} | {step} | {cell.above_best:.3f} | "
            f"{cell.cpu_s:.2f} CPU s |"
        )


def _ablation_rows(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| workload | GPUs | transfers of the step, smart -> sequential | published | moved | step |"
    yield "|---|---:|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['model']} | {row['gpus']} | {row['smart_transfer_frac']:.1%} -> "
            f"{row['sequential_transfer_frac']:.1%} | {PUBLISHED_TRANSFERS[row['model'], row['gpus']]} % | "
            f"{row['smart_moved_bytes'] / 1e9:.2f} -> {row['sequential_moved_bytes'] / 1e9:.2f} GB | "
            f"{row['smart_step_s']:.3f} -> {row['sequential_step_s']:.3f} s |"
        )


def _sensitivity_rows() -> Iterator[str]:
    yield "| workload | GPUs | samples of each task: speedup of Spindle |"
    yield "|---|---:|---|"
    for model, gpus in SENSITIVE:
        texts = []
        for samples in SAMPLES[model]:
            ours = measure(model, gpus, samples=samples).speedup("spindle")
            texts.append(f"{samples}: {f'{ours:.2f}x' if ours else 'no plan'}")
        yield f"| {model} | {gpus} | {', '.join(texts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest cluster of each workload")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    smallest = {"qwen_val": 32}
    cells = [c for c in CELLS if not arguments.quick or c[1] == smallest.get(c[0], NODE)]
    measured = [measure(*cell) for cell in cells]
    ablated = [ablate(*cell) for cell in PUBLISHED_TRANSFERS if cell in cells]
    if arguments.json:
        rows = [
            {
                "model": cell.model,
                "gpus": cell.gpus,
                "speedups": {name: cell.speedup(name) for name in FAMILIES},
                "published": PUBLISHED.get((cell.model, cell.gpus), {}),
                "above_best": cell.above_best,
                "cpu_s": cell.cpu_s,
            }
            for cell in measured
        ]
        print(json.dumps({"rows": rows, "placement": ablated}, indent=1))
        return
    print(*_rows(measured), "", *_ablation_rows(ablated), sep="\n")
    if not arguments.quick:
        print("", *_sensitivity_rows(), sep="\n")


if __name__ == "__main__":
    main()
