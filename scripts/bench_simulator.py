"""Markdown table (or --json): how long a simulation takes from a plan to its step time, and its parts.

Cold: each measurement is a process of its own that has imported everything and remembers nothing; medians of CPU
seconds. Three modules (vision pp 8, llm pp 16, generator pp 8, dp 1) and 512 microbatches are 32,768 actions; on shared
cores the clock goes from event to event, else it makes one pass. --quick: 64 microbatches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_mosaic.cost_model.clock.machine import Machine, SharedCores
from megatron_mosaic.cost_model.clock.program import fold
from megatron_mosaic.cost_model.clock.run import run_clock
from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate_planned
from megatron_mosaic.cost_model.source import AnalyticCosts
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.cluster import Cluster, Link
from megatron_mosaic.plan.training import DEFAULT_SETUP
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload
from megatron_mosaic.schedules import build_schedule

REPEATS = 5
CORES = 16
LAYERS, WIDTH, TOKENS = 32, 4096, 1024


def module(name: str, role: Role) -> ModuleConfig:
    return ModuleConfig(
        name=name,
        role=role,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_heads=WIDTH // 128,
        ffn_hidden_size=4 * WIDTH,
        tokens_per_item=TOKENS,
    )


VISION, LLM = module("vision", Role.encoder), module("llm", Role.backbone)
GENERATOR = module("generator", Role.generator)
EDGES = tuple(
    Edge(source=a, target=b, rows_per_item=TOKENS, width=WIDTH) for a, b in (("vision", "llm"), ("llm", "generator"))
)


def build_case(modules: dict[str, tuple[str, Layout]], microbatches: int) -> tuple[Plan, Workload, Cluster]:
    configs = [config for config in (VISION, LLM, GENERATOR) if config.name in modules]
    edges = tuple(edge for edge in EDGES if {edge.source, edge.target} <= {*modules})
    batch = microbatches * modules["llm"][1].dp
    workload = Workload(name="bench", modules=tuple(configs), edges=edges, global_batch_size=batch)
    placed = {name: ModulePlan(ranks=RankSet.parse(ranks), layout=x) for name, (ranks, x) in modules.items()}
    world_size = 1 + max(each.ranks.last for each in placed.values())
    plan = Plan(
        workload="bench",
        world_size=world_size,
        global_batch_size=batch,
        micro_batch_size=1,
        schedule=ScheduleChoice("1f1b"),
        modules=placed,
    )
    links = [Link(name=n, bytes_per_s=w, latency_s=5e-6, source="bench") for n, w in (("in", 450e9), ("out", 50e9))]
    nodes = -(-world_size // 8)
    gpu = load_gpu_type("h100_sxm")
    cluster = Cluster(name="bench", gpu=gpu, num_nodes=nodes, gpus_per_node=8, intra=links[0], inter=links[1])
    return plan, workload, cluster


class CrowdedCosts(AnalyticCosts):
    """As if all ranks shared some cores, a thread each."""

    def machine(self, threads: Sequence[int]) -> Machine:
        return SharedCores(cores=CORES, threads=tuple(threads))


def cases(microbatches: int) -> dict[str, tuple[dict[str, tuple[str, Layout]], int, type[AnalyticCosts]]]:
    """Name -> modules, microbatches, costs."""
    eight, sixteen = Layout(pp=8), Layout(pp=16)
    apart = {"vision": ("0-7", eight), "llm": ("8-23", sixteen), "generator": ("24-31", eight)}
    shared = {"vision": ("0-7", eight), "llm": ("0-15", sixteen), "generator": ("8-15", eight)}
    large = {"vision": ("0-4095", Layout(dp=4096)), "llm": ("4096-102399", Layout(tp=8, pp=16, dp=768))}
    everywhere = {"vision": ("0-102399", Layout(tp=2, dp=51200)), "llm": ("0-102399", Layout(tp=8, pp=16, dp=800))}
    return {
        "ranks apart": (apart, microbatches, AnalyticCosts),
        "ranks shared": (shared, microbatches, AnalyticCosts),
        f"ranks shared, on {CORES} cores": (shared, microbatches, CrowdedCosts),
        "102,400 ranks apart, 64 microbatches": (large, 64, AnalyticCosts),
        "102,400 ranks shared, 64 microbatches": (everywhere, 64, AnalyticCosts),
    }


def measure(name: str, microbatches: int) -> dict[str, float]:
    """Seconds of the parts, then of the whole in one call; in a process that has done nothing yet."""
    modules, count, costs = cases(microbatches)[name]
    plan, workload, cluster = build_case(modules, count)
    began = time.process_time()
    schedule = build_schedule(plan, workload)
    built = time.process_time()
    price = replace(CostModel(workload, cluster).price(plan), source=costs(cluster, DEFAULT_SETUP))
    priced = time.process_time()
    program = fold(schedule, price.work.graph, price.work.replicas.classes)
    folded = time.process_time()
    job_s = [price.costs[lane].seconds(kind) for lane, kind in program.jobs]
    lag_s = [0.0] + [price.transfer_s(since, to) for since, to in program.links[1:]]
    ready = time.process_time()
    run_clock(program, job_s, lag_s, price.machine_of(program.lane_of, price.work.replicas.share))
    done = time.process_time()
    return {
        "actions": len(program.slots),
        "build_s": built - began,
        "price_s": priced - built + ready - folded,
        "fold_s": folded - priced,
        "clock_s": done - ready,
    }


def measure_all(name: str, microbatches: int) -> float:
    """Seconds from a plan to its step time, of the same step as `measure`."""
    modules, count, costs = cases(microbatches)[name]
    plan, workload, cluster = build_case(modules, count)
    began = time.process_time()
    price = replace(CostModel(workload, cluster).price(plan), source=costs(cluster, DEFAULT_SETUP))
    simulation = simulate_planned(price)
    assert simulation.step_s > 0
    return time.process_time() - began


def bench(microbatches: int, repeats: int) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:
        for name in cases(microbatches):
            parts = [fresh.apply(measure, (name, microbatches)) for _ in range(repeats)]
            whole = [fresh.apply(measure_all, (name, microbatches)) for _ in range(repeats)]
            row: dict[str, float | str] = {key: statistics.median(each[key] for each in parts) for key in parts[0]}
            rows.append({"case": name, **row, "all_s": statistics.median(whole)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows = bench(64 if arguments.quick else 512, 1 if arguments.quick else REPEATS)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| plan | actions | build | price | fold | clock | all in | actions/s, clock | actions/s, all in |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        parts = " | ".join(f"{1e3 * row[key]:.1f} ms" for key in ("build_s", "price_s", "fold_s", "clock_s", "all_s"))
        rates = " | ".join(f"{row['actions'] / row[key]:.2e}" for key in ("clock_s", "all_s"))
        print(f"| {row['case']} | {row['actions']} | {parts} | {rates} |")


if __name__ == "__main__":
    main()
