"""Markdown table (or --json): how long `mosaic plan` takes, by number of GPUs.

Each row is a cold process of the command, on one core: its CPU seconds with start-up, imports and the first simulation.
A batch of 512 samples up to 3,072 GPUs, one sample a GPU above. --quick: 64 GPUs only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

GPUS_PER_NODE = 8
TARGET_S = {64: 1.5, 512: 3.0, 3072: 10.0, 10240: 20.0, 102400: 60.0}
MODELS = ("vlm_7b", "qwen2_vl_72b")
MANY_MODULES, MANY_MODULES_GPUS, MANY_MODULES_TARGET_S = "six_encoders", 64, 10.0
SHARED_BATCH = 512  # up to
SHARED_BATCH_GPUS = 3072


def cases(is_quick: bool) -> Iterator[tuple[str, int, float]]:
    """Model, GPUs, the CPU seconds that it should not exceed."""
    for model in MODELS:
        for gpus, target_s in TARGET_S.items():
            if not is_quick or gpus == min(TARGET_S):
                yield model, gpus, target_s
    if not is_quick:
        yield MANY_MODULES, MANY_MODULES_GPUS, MANY_MODULES_TARGET_S


def run(model: str, gpus: int) -> dict[str, Any]:
    """One command; the children's CPU seconds are its own, as it is the only child meanwhile."""
    batch = SHARED_BATCH if gpus <= SHARED_BATCH_GPUS else gpus
    words = [
        f"model={model}",
        "cluster=h100_8x8",
        f"cluster.num_nodes={gpus // GPUS_PER_NODE}",
        f"workload.global_batch_size={batch}",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mosaic.cli", "plan", *words, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(done.stdout)
    return {
        "model": model,
        "gpus": gpus,
        "batch": batch,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "evaluated": report["evaluated"],
        "step_s": report["predicted"]["step_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows = []
    if not arguments.json:
        print("| model | GPUs | batch | CPU | target | plans priced | step |")
        print("|---|---:|---:|---:|---:|---:|---:|")
    for model, gpus, target_s in cases(arguments.quick):
        row = run(model, gpus) | {"target_s": target_s}
        rows.append(row)
        if not arguments.json:
            took = f"{row['cpu_s']:.1f} s | {target_s:g} s | {row['evaluated']}"
            print(f"| {model} | {gpus:,} | {row['batch']:,} | {took} | {row['step_s']:.4g} s |", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
