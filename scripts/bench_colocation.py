"""Two modules on one device: in turns, or beside each other? Real Megatron blocks, balanced and not, small to large.

For every pair: seconds in turns on the whole device (twice: the noise), beside each other on lanes (on a GPU on plain
streams and on every pair of quotas), and the gain; on a CPU, where blocks are timed alone as well, the gain that the
interference model predicts, fitted to the other pairs only, and the choice that follows from it: side by side, or in
turns. Gradients beside are compared with those in turns. Medians of 9 rounds. Under 3 minutes on a CPU, 10 on a GPU;
--quick: the smallest pairs in 20 s.

--training: the reference model's step under `overlap` on one rank as well, in turns and beside, runs in alternation.

On a machine that others use, no ratio means anything: busy threads are compared with the clock after every pair, and
the answer is `loaded: true`, without ratios, exit status 1. Exit status 1 as well if gradients differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.parallel_state_ext.rebound import cpu

cpu.install()

from megatron_mosaic.calibrate.beside import pairs  # noqa: E402  Megatron, which has to find a CPU prepared
from megatron_mosaic.calibrate.beside.colocated import MAX_LOADED_FRAC, Alone, cpu_sizes  # noqa: E402
from megatron_mosaic.calibrate.beside.interference import Fit, PairTime, Side, error_frac  # noqa: E402
from megatron_mosaic.calibrate.beside.pairs import Block, BlockSize  # noqa: E402
from megatron_mosaic.colocation.backend import choose_backend  # noqa: E402
from megatron_mosaic.colocation.backend_cpu import cores_of_rank  # noqa: E402
from megatron_mosaic.colocation.lane import Lanes  # noqa: E402
from megatron_mosaic.parallel_state_ext.lane_state import lane_thread  # noqa: E402

CPU_HIDDEN = ((64, 64), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024))
GPU_HIDDEN = ((512, 512), (1024, 1024), (1024, 2048), (2048, 2048), (2048, 4096), (4096, 4096))
SHARES = (0.5,)  # the first side's
QUOTAS = (0.25, 1 / 3, 0.5, 2 / 3, 0.75)  # of them, where they are enforced


def sizes_of(hidden: tuple[int, int], is_gpu: bool) -> tuple[BlockSize, BlockSize]:
    """An encoder's block and a backbone's."""
    encoder, backbone = hidden
    if is_gpu:
        return (
            BlockSize(hidden=encoder, tokens=576, items=16),
            BlockSize(hidden=backbone, tokens=1024, items=4),
        )
    return cpu_sizes(hidden)


class Bench:
    """All pairs of this machine. `rows` are told as they are measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.is_gpu = torch.cuda.is_available()
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.scopes = pairs.make_scopes()
        self.repeats = 5 if arguments.quick else 9
        self.num_units = 4 if self.is_gpu else 1
        hidden = GPU_HIDDEN if self.is_gpu else CPU_HIDDEN
        self.hidden = hidden[:3] if arguments.quick else hidden
        self.cores = len(cores_of_rank())
        self.lanes = self._open_lanes()
        self._out: Path | None = arguments.out
        self._alone = Alone(self.scopes, self.dtype, self.repeats, self.num_units)

    def tell(self, **row: Any) -> None:
        """Write the row now: nothing is lost at a time limit."""
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr)

    def is_loaded(self) -> bool:
        """Whether others take this machine's time."""
        taken = pairs.loaded_frac(1 if self.is_gpu else self.cores)
        self.tell(stage="load", taken_frac=round(taken, 4))
        return taken > MAX_LOADED_FRAC

    def _open_lanes(self) -> list[tuple[str, Lanes]]:
        """Lanes beside each other, with their backend's name: of every backend and share that run here."""
        shares = {"green_context": QUOTAS, "streams": SHARES} if self.is_gpu else {"cpu": SHARES}
        backends = {name: choose_backend(name, lane_thread).backend for name in shares}
        return [(name, backends[name].open({0: share, 1: 1 - share})) for name in shares for share in shares[name]]

    def close(self) -> None:
        """Give back what lanes were granted."""
        for _, lanes in self.lanes:
            lanes.close()

    def side(self, block: Block, counts: set[int]) -> Side:
        """The block alone on each count of cores."""
        side = self._alone.side(block, tuple(sorted(counts)))
        self.tell(stage="alone", side=side.name, seconds=dict(side.alone_s), host_s=side.host_s)
        return side

    def pairs(self) -> Iterator[dict[str, Any]]:
        """A row for every pair of blocks and of lanes."""
        for hidden in self.hidden:
            sizes = sizes_of(hidden, self.is_gpu)
            blocks = (
                Block(sizes[0], self.dtype, self.scopes, "first"),
                Block(sizes[1], self.dtype, self.scopes, "second"),
            )
            for name, lanes in self.lanes:
                yield self.pair(blocks, name, lanes)

    def pair(self, blocks: tuple[Block, Block], backend: str, lanes: Lanes) -> dict[str, Any]:
        """Measure one pair."""
        granted = tuple(info.granted for info in lanes.infos.values())
        threads = (1, 1) if self.is_gpu else granted
        whole = next(iter(lanes.infos.values())).total
        found = pairs.measure_pair(blocks, lanes, threads, self.cores, self.num_units, self.repeats)
        sides = tuple(self.side(b, {g, whole}) for b, g in zip(blocks, granted)) if not self.is_gpu else ()
        row = {
            "name": f"{blocks[0].size.hidden}/{blocks[1].size.hidden} {backend} {granted[0]}+{granted[1]}",
            "sides": [block.size.name for block in blocks],
            "turns_s": found.turns_median_s,
            "beside_s": found.beside_median_s,
            "noise_frac": found.noise_frac,
            "parity_ok": found.is_equal,
        }
        self.tell(stage="pair", **row)
        return row | {"measured": (sides, granted, whole)}


def add_gains(rows: list[dict[str, Any]], bandwidth_bytes_per_s: float) -> dict[str, float]:
    """Gain of every pair, and what the model that was fitted to the others predicts (where sides were timed alone),
    with the choice that follows. The constants fitted to all pairs; errors, of these and of those left out."""
    for row in rows:
        row["gain"] = row["turns_s"] / row["beside_s"]
    known = [row for row in rows if row["measured"][0]]
    times = [PairTime(sides=row["measured"][0], granted=row["measured"][1], beside_s=row["beside_s"]) for row in known]
    if len({time.names for time in times}) < 3:
        return {}
    fit = Fit(times, bandwidth_bytes_per_s)
    held_out, best = fit.held_out(), fit.best()
    for row, time_, model in zip(known, times, held_out, strict=True):
        row["predicted_gain"] = time_.predict_gain(model, row["measured"][2])
        row["choice"] = "side by side" if row["predicted_gain"] > 1 else "in turns"
        is_noise = abs(row["gain"] - 1) <= row["noise_frac"]
        row["choice_ok"] = is_noise or (row["gain"] > 1) == (row["predicted_gain"] > 1)
        row["gain_error_frac"] = abs(row["predicted_gain"] / row["gain"] - 1)
    return {
        "bandwidth_bytes_per_s": bandwidth_bytes_per_s,
        "residual": best.residual,
        "serial_frac": best.serial_frac,
        "cache_bytes": best.cache_bytes,
        "error_frac": error_frac(times, [best] * len(times)),
        "held_out_error_frac": error_frac(times, held_out),
    }


def copy_bytes_per_s(num_threads: int) -> float:
    """Of a large copy, read and written."""
    torch.set_num_threads(num_threads)
    source = torch.ones((256 << 20) // 4, device=cpu.device())
    target = torch.empty_like(source)
    seconds = statistics.median(pairs.wall_s(lambda: target.copy_(source)) for _ in range(5))
    torch.set_num_threads(1)
    return 2.0 * source.numel() * 4 / seconds


PLAN = """\
mosaic_plan: 1
workload: any2any-digits
world_size: 1
global_batch_size: 16
micro_batch_size: 2
schedule: overlap
modules:
  vision: {ranks: '0', layout: {dp: 1}, quota: 0.5}
  llm: {ranks: '0', layout: {dp: 1}, quota: 0.5}
  generator: {ranks: '0', layout: {dp: 1}}
"""


def train_step_s(backend: str, steps: int) -> float:
    """Seconds of the median step of one run."""
    with tempfile.TemporaryDirectory() as directory:
        plan = Path(directory) / "plan.yaml"
        plan.write_text(PLAN)
        words = ["--mosaic-quota-backend", backend, "--train-iters", str(steps), "--eval-iters", "0"]
        command = [sys.executable, "-m", "megatron_mosaic.cli", "train", str(plan), *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)["step_s"])


def measure_training(is_gpu: bool, num_runs: int = 3) -> dict[str, float]:
    """Seconds of a training step in turns and beside, medians of runs in alternation; noise: turns against turns."""
    lanes, steps = ("green_context" if is_gpu else "cpu"), 40
    turns: list[float] = []
    beside: list[float] = []
    for _ in range(num_runs):
        turns.append(train_step_s("none", steps))
        beside.append(train_step_s(lanes, steps))
        turns.append(train_step_s("none", steps))
    turns_s, beside_s = statistics.median(turns), statistics.median(beside)
    noise = abs(statistics.median(turns[::2]) / statistics.median(turns[1::2]) - 1)
    return {"turns_s": turns_s, "beside_s": beside_s, "gain": turns_s / beside_s, "noise_frac": noise}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gain of every pair, measured and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.5), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row["gain"] for row in rows], xerr=[row["noise_frac"] for row in rows], label="measured")
    predicted = [(place, row["predicted_gain"]) for place, row in zip(places, rows) if row.get("predicted_gain")]
    axes.plot([gain for _, gain in predicted], [place for place, _ in predicted], "kD", label="predicted")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(list(places), [row["name"] for row in rows])
    axes.set_xlabel("gain over taking turns")
    axes.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append every row when it is measured")
    parser.add_argument("--png", type=Path, metavar="FILE.png", help="draw the gains (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--training", action="store_true", help="real training steps, too: a minute more")
    parser.add_argument("--quick", action="store_true", help="the smallest pairs, few rounds")
    arguments = parser.parse_args()
    started = time.perf_counter()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    bench, rows, loaded = Bench(arguments), [], False
    bench.tell(stage="machine", cores=bench.cores, gpu=bench.is_gpu, load=os.getloadavg()[0])
    for row in bench.pairs():
        rows.append(row)
        loaded = loaded or bench.is_loaded()
        if loaded:
            break
    training = measure_training(bench.is_gpu) if arguments.training and not loaded else None
    loaded = loaded or bench.is_loaded()
    interference = {} if loaded else add_gains(rows, copy_bytes_per_s(bench.cores))
    result = {
        "loaded": loaded,
        "noise_frac": max(row["noise_frac"] for row in rows),
        "parity_ok": all(row["parity_ok"] for row in rows),
        "seconds": time.perf_counter() - started,
        "training": None if loaded else training,
        "interference": interference,
        "choices_ok": all(row.get("choice_ok", True) for row in rows),
        "pairs": [{key: value for key, value in row.items() if key != "measured"} for row in rows],
    }
    if arguments.png and not loaded:
        draw(rows, arguments.png)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_table(result)
    bench.close()
    dist.destroy_process_group()
    return int(loaded or not result["parity_ok"])


def print_table(result: dict[str, Any]) -> None:
    """A line a pair, and one for the training step."""
    if result["training"]:
        step = result["training"]
        print(
            f"training step: turns {1e3 * step['turns_s']:.1f} ms, beside {1e3 * step['beside_s']:.1f} ms, "
            f"gain {step['gain']:.2f}, noise {step['noise_frac']:.2f}"
        )
    if result["loaded"]:
        print("the machine is loaded: no ratios")
    for row in result["pairs"]:
        gain, predicted = row.get("gain"), row.get("predicted_gain")
        print(
            f"{row['name']:<36} turns {1e3 * row['turns_s']:9.2f} ms  beside {1e3 * row['beside_s']:9.2f} ms  "
            f"gain {f'{gain:.2f}' if gain else '-':>5}  predicted {f'{predicted:.2f}' if predicted else '-':>5}  "
            f"{row.get('choice', ''):<12} {'' if row.get('choice_ok', True) else 'WRONG '}"
            f"noise {row['noise_frac']:.2f}  gradients {'equal' if row['parity_ok'] else 'DIFFER'}"
        )


if __name__ == "__main__":
    sys.exit(main())
