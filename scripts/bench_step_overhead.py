"""Markdown table: step time of a homogeneous plan through this runtime over stock Megatron's, on the quickstart model.

Both sides run the same `pretrain()` with the same flags, data and weights on 4 CPU processes; stock is one module that
calls the three stages in turn (stock_any2any.py). Runs alternate: stock, ours, stock, ours, ...; a step's time is taken
around Megatron's `train_step` on rank 0, the first steps of a run are left out, and the rest gives one median a side.
Samples are made before the first step on both sides, as a loader's workers would; `--make-samples` leaves that in the
steps, where ours makes every sample of the global batch on every rank, and stock each one once.
Noise is how far the medians of even and odd runs of the same side differ. Four ranks on two cores wait for each other,
so the processor time of rank 0, in brackets, says more about the work that we add than the clock does.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.rebound import cpu

TARGET_FRAC = 0.03
PLAN = """\
mosaic_plan: 1
workload: any2any-digits
world_size: 4
global_batch_size: {global_batch_size}
micro_batch_size: {micro_batch_size}
schedule: 1f1b
modules:
  vision: {{ranks: '0-3', layout: {{{layout}}}}}
  llm: {{ranks: '0-3', layout: {{{layout}}}}}
  generator: {{ranks: '0-3', layout: {{{layout}}}}}
"""
LAYOUTS = {"dp4": "dp: 4", "tp2 dp2": "tp: 2, dp: 2"}
STEADY = ["--eval-iters", "0", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0.0"]
STEADY += ["--log-interval", "100000"]


def timed_main(main: Callable[[], int], path: str, profiled: bool, in_steps: bool) -> int:
    """Run `main`; rank 0 writes seconds, losses and gradient norm of every step to `path`."""
    import megatron.training.training as training
    from megatron.training import get_args

    stock_step, steps = training.train_step, []
    profile = cProfile.Profile()

    def train_step(*args: Any, **kwargs: Any) -> Any:
        if profiled and len(steps) == 5:
            profile.enable()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        result = stock_step(*args, **kwargs)
        taken = {"seconds": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}
        steps.append(taken | {"losses": {name: float(loss) for name, loss in result[0].items()}})
        return result

    if not in_steps:
        import stock_any2any

        from megatron_mosaic.any2any import pretrain

        pretrain.make_datasets = stock_any2any.make_datasets = _made_at_once(pretrain.make_datasets)
    training.train_step = train_step
    status = main()
    profile.disable()
    if get_args().rank == 0:
        Path(path).write_text(json.dumps(steps), encoding="utf-8")
        if profiled:
            with Path(f"{path}.profile").open("w", encoding="utf-8") as text:
                stats = pstats.Stats(profile, stream=text)
                stats.sort_stats("tottime").print_stats(40)
                stats.sort_stats("cumtime").print_stats("megatron_mosaic", 40)
    return status


def _made_at_once(make_datasets: Callable[..., Any]) -> Callable[..., Any]:
    """`make_datasets` whose datasets are lists."""

    def make(*args: Any) -> Callable[[Any], tuple[list[Any], ...]]:
        provider = make_datasets(*args)
        return lambda num_samples: tuple([one[i] for i in range(len(one))] for one in provider(num_samples))

    return make


def run_once(side: str, plan: Path, args: argparse.Namespace, out: Path, *, profiled: bool = False) -> list[Any]:
    """One training run. Returns what rank 0 saw of every step after the warm-up."""
    import stock_any2any

    from megatron_mosaic.any2any import pretrain

    main = pretrain.main if side == "ours" else stock_any2any.main
    command = [*STEADY, "--train-iters", str(args.steps), "--mosaic-plan", str(plan)]
    run_forked(4, with_command_line, command, timed_main, main, str(out), profiled, args.make_samples)
    return json.loads(out.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def compare(layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    runs: dict[str, list[list[float]]] = {"stock": [], "ours": []}
    cpu_s: dict[str, list[float]] = {"stock": [], "ours": []}
    losses: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        plan = Path(directory) / "plan.yaml"
        sizes = {"micro_batch_size": args.micro_batch_size, "global_batch_size": args.global_batch_size}
        plan.write_text(PLAN.format(layout=LAYOUTS[layout], **sizes), encoding="utf-8")
        if args.profile:
            for side in runs:
                run_once(side, plan, args, Path(directory) / "steps.json", profiled=True)
                print(side, (Path(directory) / "steps.json.profile").read_text(encoding="utf-8"))
        for _ in range(args.runs):
            for side in runs:
                steps = run_once(side, plan, args, Path(directory) / "steps.json")
                runs[side].append([step["seconds"] for step in steps[args.warmup :]])
                cpu_s[side] += [step["cpu_s"] for step in steps[args.warmup :]]
                losses[side] = [step["losses"] for step in steps]
    error = max(
        abs(ours[name] - value) / abs(value)
        for stock, ours in zip(losses["stock"][:3], losses["ours"][:3], strict=True)
        for name, value in stock.items()
    )
    medians = {side: statistics.median(itertools.chain(*found)) for side, found in runs.items()}
    return {
        "layout": layout,
        "stock_s": medians["stock"],
        "ours_s": medians["ours"],
        "overhead_frac": medians["ours"] / medians["stock"] - 1,
        "stock_cpu_s": statistics.median(cpu_s["stock"]),
        "ours_cpu_s": statistics.median(cpu_s["ours"]),
        "noise_frac": max(map(noise, runs.values())),
        "seconds": runs,
        "run_medians_s": {side: [statistics.median(run) for run in found] for side, found in runs.items()},
        "loss_rel_err": error,
    }


def noise(runs: list[list[float]]) -> float:
    """Even runs against odd runs of one side: the larger median over the smaller, less 1."""
    if len(runs) < 2:
        return float("nan")
    halves = [statistics.median(itertools.chain(*runs[first::2])) for first in (0, 1)]
    return max(halves) / min(halves) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4, help="of each side")
    parser.add_argument("--steps", type=int, default=40, help="per run")
    parser.add_argument("--warmup", type=int, default=5, help="steps of a run that are left out")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--layout", choices=list(LAYOUTS), action="append", help="default: all")
    parser.add_argument(
        "--profile", action="store_true", help="first print where rank 0 of either side spends its time"
    )
    parser.add_argument("--make-samples", action="store_true", help="within the steps")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu.install()
    import sklearn.datasets  # noqa: F401  seconds to import; forked ranks inherit it

    found = [compare(layout, args) for layout in args.layout or LAYOUTS]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(
        "| every module | stock ms | ours ms | overhead | noise | target met | loss error, 3 steps |\n"
        + "|---" * 7
        + "|"
    )
    for row in found:
        overhead, floor = row["overhead_frac"], row["noise_frac"]
        met = "yes" if overhead <= max(TARGET_FRAC, floor) else "no"
        times = " | ".join(f"{1e3 * row[f'{s}_s']:.1f} ({1e3 * row[f'{s}_cpu_s']:.1f})" for s in ("stock", "ours"))
        of_cpu = row["ours_cpu_s"] / row["stock_cpu_s"] - 1
        measured = (
            f"{100 * overhead:+.1f} % ({100 * of_cpu:+.1f} %) | {100 * floor:.1f} % | {met} | {row['loss_rel_err']:.0e}"
        )
        print(f"| {row['layout']} | {times} | {measured} |")


if __name__ == "__main__":
    main()
