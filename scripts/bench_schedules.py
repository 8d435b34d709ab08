"""Every schedule of one plan side by side: step, bubble and activation bytes per module, predicted and measured here.

The reference model on four processes: vision and generator dp 4, llm pp 2 (two virtual stages where the schedule
interleaves) and dp 2. Predicted by the profile of this machine (`mosaic calibrate`; without one only the bytes),
measured by `mosaic train` (median step) and `mosaic check` (activation meter). Prints a table, with `--json` one list;
`--quick`: few steps. A run that fails is exit status 1. Compare steps on a quiet machine alone: the load is in the row.
"""

from __future__ import annotations

import argparse
import json
import os
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


def measure(plan: Plan, steps: int) -> dict[str, Any]:
    """Median step and its bubbles; bytes of a module's fullest rank."""
    with tempfile.TemporaryDirectory(prefix="bench-schedules-") as directory:
        path = str(Path(directory) / "plan.yaml")
        save_plan(plan, path)
        trained = run_mosaic("train", path, "--train-iters", str(steps))["measured"]
        checked = run_mosaic("check", path)
    held = checked["peak_activation_bytes_by_module"]
    return {"step_s": trained["step_s"], "bubble_frac": trained["bubble_frac"], "bytes": held}


def bench(microbatches: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    for name in SCHEDULES:
        plan = make_plan(name, microbatches)
        row = {"schedule": name, "predicted": predict(plan), "measured": measure(plan, steps)}
        rows.append({**row, "load": os.getloadavg()[0]})
        print(f"{name}: measured", file=sys.stderr)
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    modules = [module.name for module in WORKLOAD.modules]
    heads = [
        "schedule",
        *(f"{what} {how}" for how in ("predicted", "measured") for what in ("step", "bubble", *modules)),
    ]
    lines = ["| " + " | ".join([*heads, "load"]) + " |", "|---" + "|---:" * len(heads) + "|"]
    for row in rows:
        cells = [row["schedule"]]
        for found in (row["predicted"], row["measured"]):
            cells.append("-" if found["step_s"] is None else f"{1e3 * found['step_s']:.0f} ms")
            cells.append("-" if found["bubble_frac"] is None else f"{found['bubble_frac']:.0%}")
            cells += [f"{found['bytes'][module] / 1e6:.2f} MB" for module in modules]
        lines.append("| " + " | ".join([*cells, f"{row['load']:.1f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows = bench(8, 3) if arguments.quick else bench(32, 20)
    print(json.dumps(rows, indent=1) if arguments.json else render(rows))


if __name__ == "__main__":
    main()
