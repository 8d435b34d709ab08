"""Bytes that each rank reads of its samples' files in a step, under plans of one global batch. Starts no process.

python scripts/bytes_read.py [--steps N] [--json]

The items of every rank are those that its lanes ask for (StepMap), and what they read of the files is counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pack_digits import pack

from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.files.packed import PackedDigits, collate_packed
from megatron_mosaic.any2any.sizes import Any2AnySizes, workload
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.runtime.step import Batches

BATCH, MICRO_BATCH = 16, 2
MODULES = ("vision", "llm", "generator")
# Layout and ranks of each of MODULES
PLANS: dict[str, tuple[tuple[str, Layout], ...]] = {
    "dp 1": (("0", Layout()),) * 3,
    "dp 2": (("0-1", Layout(dp=2)),) * 3,
    "dp 4": (("0-3", Layout(dp=4)),) * 3,
    "vision dp 2, llm tp 2 dp 2": (("0-1", Layout(dp=2)), ("0-3", Layout(tp=2, dp=2)), ("3", Layout())),
    "disjoint": (("0-1", Layout(dp=2)), ("2-3", Layout(dp=2)), ("0", Layout())),
}


def build_plan(name: str) -> Plan:
    """One of PLANS."""
    modules = {
        module: ModulePlan(ranks=RankSet.parse(ranks), layout=layout)
        for module, (ranks, layout) in zip(MODULES, PLANS[name], strict=True)
    }
    return Plan(
        workload="any2any-digits",
        world_size=1 + max(rank for module in modules.values() for rank in module.ranks.ranks),
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        schedule=ScheduleChoice("1f1b"),
        modules=modules,
    )


def count(plan: Plan, files: Path, steps: int) -> list[int]:
    """Bytes that every rank reads of the records in `files` in so many steps."""
    definition = Any2Any(workload(Any2AnySizes(), plan.global_batch_size), build_config=_builds_nothing)
    return [sum(_read(plan, rank, files, steps, definition)) for rank in range(plan.world_size)]


def _builds_nothing(*_: object) -> NoReturn:
    raise AssertionError("no layer is built here")


def _read(plan: Plan, rank: int, files: Path, steps: int, definition: Any2Any) -> Iterator[int]:
    """Bytes of each step of a rank: its lanes' inputs, as the runtime selects them."""
    model = definition.workload
    of_plan = PlanMap(RankView.of(plan, rank, model.edges), model)
    size = plan.micro_batch_size * plan.modules["llm"].layout.dp
    for step in range(steps):
        dataset = PackedDigits(files, Any2AnySizes().seq_length)
        starts = range(step * plan.global_batch_size, (step + 1) * plan.global_batch_size, size)
        samples = [[dataset[number] for number in range(start, start + size)] for start in starts]
        batches = Batches(samples, collate_packed)
        metadata = [
            Metadata(
                items=definition.list_items(batch),
                links={(edge.source, edge.target): definition.list_links(edge, batch) for edge in model.edges},
                content=b"",
            )
            for batch in batches.of_microbatch
        ]
        step_map = StepMap(of_plan, metadata)
        for module in of_plan.view.modules:
            for unit in range(len(samples)):
                shard = step_map.shard(module, unit)
                if shard.items:
                    definition.select_inputs(module, batches.covering(step_map.covered(module, unit)), shard)
        yield dataset.bytes_read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        pack(Path(directory), BATCH * given.steps, Any2AnySizes().seq_length, 1234)
        files = Path(directory) / "train"
        rows = {name: count(build_plan(name), files, given.steps) for name in PLANS}
        whole = (files / "records.bin").stat().st_size
    if given.json:
        print(json.dumps({"bytes": rows, "all": whole}))
        return
    print("| plan | bytes read a step, by rank | of the step's samples |\n|---|---|---|")
    for name, counts in rows.items():
        steps, shares = given.steps, ", ".join(f"{100 * each / whole:.0f} %" for each in counts)
        print(f"| {name} | {', '.join(f'{each // steps:,}' for each in counts)} | {shares} |")


if __name__ == "__main__":
    main()
