"""Markdown table: what one rank takes to find its items, rows and messages of a microbatch, by data-parallel slots.

A vision encoder, a backbone and an image generator; every sample brings 0 to 2 images and draws 0 or 1. On ranks of
its own, the encoder's images are shared out anew in every microbatch. No microbatch repeats an earlier one, so nothing
comes from the cache. Medians on one processor.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, Items, Links
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

VISION, LLM, GENERATOR = "vision", "llm", "generator"
IMAGE_TOKENS, SEQUENCE, WIDTH = 256, 4096, 1024
VISIONS = {"all alike": (1, False), "vision cp2": (2, False), "vision on ranks of its own": (1, True)}  # cp, apart
CHANCES = {VISION: (0.2, 0.5, 0.3), GENERATOR: (0.7, 0.3)}  # of 0, 1, 2 images a sample


def build_workload() -> Workload:
    def module(name: str, role: Role, tokens: int) -> ModuleConfig:
        sizes = {"num_layers": 24, "hidden_size": WIDTH, "num_heads": 16, "ffn_hidden_size": 4 * WIDTH}
        ends = {"vocab_size": 32000} if role is Role.backbone else {"input_size": WIDTH, "output_size": WIDTH}
        return ModuleConfig(name=name, role=role, tokens_per_item=tokens, causal=role is Role.backbone, **sizes, **ends)

    modules = (
        module(VISION, Role.encoder, IMAGE_TOKENS),
        module(LLM, Role.backbone, SEQUENCE),
        module(GENERATOR, Role.generator, IMAGE_TOKENS),
    )
    edges = ((VISION, LLM), (LLM, GENERATOR))
    return Workload(
        name="routes",
        modules=modules,
        edges=tuple(Edge(source=a, target=b, rows_per_item=IMAGE_TOKENS, width=WIDTH) for a, b in edges),
    )


def build_plan(slots: int, samples_per_slot: int, vision_cp: int, apart: bool) -> Plan:
    same = ModulePlan(ranks=RankSet.of(range(slots)), layout=Layout(dp=slots))
    first = slots * apart
    vision = ModulePlan(
        ranks=RankSet.of(range(first, first + slots)), layout=Layout(cp=vision_cp, dp=slots // vision_cp)
    )
    return Plan(
        workload="routes",
        world_size=first + slots,
        global_batch_size=slots * samples_per_slot,
        micro_batch_size=samples_per_slot,
        schedule=ScheduleChoice("1f1b"),
        modules={VISION: vision, LLM: same, GENERATOR: same},
    )


def draw_microbatch(num_samples: int, rng: np.random.Generator) -> Metadata:
    """Images and drawings of random samples, each at a place of its own in its sample."""
    items = {LLM: Items(np.arange(num_samples), np.full(num_samples, SEQUENCE))}
    links = {}
    for name, chances in CHANCES.items():
        counts = rng.choice(len(chances), num_samples, p=chances)
        samples = np.repeat(np.arange(num_samples), counts)
        tokens = np.full(len(samples), IMAGE_TOKENS)
        nth = np.arange(len(samples)) - (np.cumsum(counts) - counts)[samples]
        own: tuple[Integers, Integers] = np.arange(len(samples)), np.zeros_like(samples)
        place = samples, nth * IMAGE_TOKENS + rng.integers(0, 64, len(samples)) + (0 if name == VISION else 2048)
        items[name] = Items(samples, tokens)
        edge, ends = ((VISION, LLM), own + place) if name == VISION else ((LLM, GENERATOR), place + own)
        links[edge] = Links(*ends, tokens)
    return Metadata(items=items, links=links)


def route(step: StepMap, view: RankView) -> None:
    """All that a training step asks for."""
    for name, module in view.modules.items():
        step.shard(name, 0)
        for end in (*module.imports, *module.exports):
            step.rows(end, 0)
            step.sends(end, 0, 0)
            step.receives(end, 0, 0)


def measure_ms(plan: Plan, workload: Workload, microbatches: int) -> tuple[float, float]:
    """(once per plan, per microbatch)."""
    rng = np.random.default_rng(0)
    start_s = time.perf_counter()
    view = RankView.of(plan, 0, workload.edges)
    of_plan = PlanMap(view, workload)
    once_s, taken = time.perf_counter() - start_s, []
    for _ in range(microbatches):
        microbatch = draw_microbatch(plan.global_batch_size, rng)
        start_s = time.perf_counter()
        route(StepMap(of_plan, [microbatch]), view)
        taken.append(time.perf_counter() - start_s)
    return 1e3 * once_s, 1e3 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 64, 1024, 8192])
    parser.add_argument("--samples-per-slot", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=20)
    args = parser.parse_args()
    workload = build_workload()
    print(f"| slots | {' | '.join(f'{name}: once ms, a microbatch ms' for name in VISIONS)} |")
    print("|---" * (1 + len(VISIONS)) + "|")
    for slots in args.slots:
        measured = (
            measure_ms(build_plan(slots, args.samples_per_slot, *vision), workload, args.microbatches)
            for vision in VISIONS.values()
        )
        print(f"| {slots} | {' | '.join(f'{once:.1f}, {each:.2f}' for once, each in measured)} |")


if __name__ == "__main__":
    main()
