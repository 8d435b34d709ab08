"""Every schedule of one plan side by side: step, bubble and activation bytes per module, predicted and measured here.

The reference model on four processes: vision and generator dp 4, llm pp 2 (two virtual stages where the schedule
interleaves) and dp 2. Predicted by the profile of this machine (`mosaic calibrate`; without one only the bytes),
measured by `mosaic train` (median step of a run, then of all runs) and `mosaic check` (activation meter). Runs
alternate over the schedules; *noise* is how far the medians of odd and even runs of one schedule differ, as a part of
the step. Prints a table, with `--json` one list; `--quick`: one short run each; `--schedules nested three_phase`: these
alone. A run that fails is exit status 1. Compare steps on a quiet machine alone: the load is in the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_mosaic.config import load_task, load_workload
from megatron_mosaic.cost_model.effects.memory import precision_of, stage_memory
from megatron_mosaic.cost_model.hardware.profile import default_profile_path
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.cost_model.source import MEASURED
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.schedules import SCHEDULES, build_schedule

MODEL = "any2any-digits"
WORKLOAD = load_workload([f"model={MODEL}"])
RANKS = 4


def make_plan(name: str, microbatches: int) -> Plan:
    """The plan in this schedule."""
    llm = Layout(pp=2, vpp=2 if name == "interleaved" else 1, dp=2)
    layouts = {"vision": Layout(dp=RANKS), "llm": llm, "generator": Layout(dp=RANKS)}
    return Plan(
        workload=WORKLOAD.name,
        digest=WORKLOAD.digest,
        world_size=RANKS,
        global_batch_size=2 * 2 * microbatches,
        micro_batch_size=2,
        schedule=ScheduleChoice(name),
        modules={n: ModulePlan(ranks=RankSet.block(0, RANKS), layout=x) for n, x in layouts.items()},
    )


def predict(plan: Plan) -> dict[str, Any]:
    """Step and bubble where this machine has a profile; bytes of a module's fullest rank."""
    work, schedule = list_stage_work(plan, WORKLOAD, RANKS), build_schedule(plan, WORKLOAD)
    held: dict[str, float] = {}
    for lane in work.lanes:
        unit_bytes = stage_memory(lane.work, precision_of(MEASURED), MEASURED).unit_bytes
        held[lane.module] = max(held.get(lane.module, 0.0), schedule.work.live_units(lane.name) * unit_bytes)
    found: dict[str, Any] = {"step_s": None, "bubble_frac": None, "bytes": held}
    if default_profile_path().exists():
        task = load_task([f"model={MODEL}", "cluster=local", f"cluster.num_ranks={RANKS}"], profile_path=None)
        simulation = simulate(plan, task.cost_model())
        found |= {"step_s": simulation.step_s, "bubble_frac": simulation.timeline().bubble_frac}
    return found


def run_mosaic(*words: str) -> dict[str, Any]:
    """The JSON object of a command. SystemExit with its stderr if it fails."""
    command = [sys.executable, "-m", "megatron_mosaic.cli", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def measure(plans: dict[str, Plan], steps: int, runs: int) -> dict[str, dict[str, Any]]:
    """By schedule: the median step and how far odd and even runs differ, bubbles, bytes of a module's fullest rank."""
    held: dict[str, dict[str, float]] = {}
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
    with tempfile.TemporaryDirectory(prefix="bench-schedules-") as directory:
        paths = {name: str(Path(directory) / f"{name}.yaml") for name in plans}
        for name, plan in plans.items():
            save_plan(plan, paths[name])
            held[name] = run_mosaic("check", paths[name])["peak_activation_bytes_by_module"]
        for run in range(runs):
            for name in plans:
                trained[name].append(run_mosaic("train", paths[name], "--train-iters", str(steps))["measured"])
            print(f"run {run + 1} of {runs}: done", file=sys.stderr)
    return {name: {**_over_runs(trained[name]), "bytes": held[name]} for name in plans}


def _over_runs(found: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [run["step_s"] for run in found]
    step_s = statistics.median(steps)
    noise_frac = None
    if len(steps) > 1:
        noise_frac = abs(statistics.median(steps[::2]) - statistics.median(steps[1::2])) / step_s
    bubble_frac = statistics.median(run["bubble_frac"] for run in found)
    return {"step_s": step_s, "noise_frac": noise_frac, "runs": steps, "bubble_frac": bubble_frac}


def bench(names: list[str], microbatches: int, steps: int, runs: int) -> list[dict[str, Any]]:
    plans = {name: make_plan(name, microbatches) for name in names}
    measured = measure(plans, steps, runs)
    load = os.getloadavg()[0]
    return [
        {"schedule": name, "predicted": predict(plan), "measured": measured[name], "load": load}
        for name, plan in plans.items()
    ]


def render(rows: list[dict[str, Any]]) -> str:
    modules = [module.name for module in WORKLOAD.modules]
    heads = [
        "schedule",
        *(f"{what} {how}" for how in ("predicted", "measured") for what in ("step", "bubble", *modules)),
        "noise",
    ]
    lines = ["| " + " | ".join([*heads, "load"]) + " |", "|---" + "|---:" * len(heads) + "|"]
    for row in rows:
        cells = [row["schedule"]]
        for found in (row["predicted"], row["measured"]):
            cells.append("-" if found["step_s"] is None else f"{1e3 * found['step_s']:.0f} ms")
            cells.append("-" if found["bubble_frac"] is None else f"{found['bubble_frac']:.0%}")
            cells += [f"{found['bytes'][module] / 1e6:.2f} MB" for module in modules]
        noise_frac = row["measured"]["noise_frac"]
        cells += ["-" if noise_frac is None else f"{noise_frac:.1%}", f"{row['load']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=int, default=4, help="of each schedule (default: %(default)s)")
    parser.add_argument("--schedules", nargs="+", choices=[*SCHEDULES], default=[*SCHEDULES], help="(default: all)")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs: at least 1")
    sizes = (8, 3, 1) if arguments.quick else (32, 20, arguments.runs)
    rows = bench(arguments.schedules, *sizes)
    print(json.dumps(rows, indent=1) if arguments.json else render(rows))


if __name__ == "__main__":
    main()
