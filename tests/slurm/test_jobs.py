"""Training jobs on a real Slurm, submitted as a user does: they end, go on after a signal, and stop where they must.

The first test is the one that always runs: a job of either form, and one that goes on under a new plan.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest

from megatron_mosaic.config import load_workload
from megatron_mosaic.cost_model.hardware.profile import save_profile
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.training import Format, TrainingSetup
from tests.cases import make_profile
from tests.slurm.cluster import Slurm, history, log_of, losses

pytestmark = pytest.mark.dist

DIGITS = load_workload(["model=any2any-digits"])
SHORT = ("train.eval_iters=0", "train.log_interval=1", "launcher.ranks_per_node=1", "train.lr=1e-3")


def write_plan(directory: Path, num_ranks: int) -> Path:
    """Every module on all ranks, the backbone tensor parallel."""
    everywhere = RankSet.block(0, num_ranks)
    data = ModulePlan(ranks=everywhere, layout=Layout(dp=num_ranks))
    split = ModulePlan(ranks=everywhere, layout=Layout(tp=2, dp=num_ranks // 2))
    plan = Plan(
        workload=DIGITS.name,
        world_size=num_ranks,
        global_batch_size=8,
        micro_batch_size=2,
        schedule=ScheduleChoice("1f1b"),
        modules={"vision": data, "llm": split, "generator": data},
        cluster={"kind": "local", "num_ranks": num_ranks},
        training=TrainingSetup(format=Format.fp32),
    )
    save_plan(plan, directory / "p.yaml")
    return directory / "p.yaml"


def submit(slurm: Slurm, plan: Path, run: Path, *words: str) -> str:
    """The job's id."""
    save_profile(make_profile(DIGITS), plan.parent / "profile.yaml")
    command = [sys.executable, "-m", "megatron_mosaic.cli", "submit", str(plan), f"launcher.run_dir={run}", "--json"]
    command += ["--profile", str(plan.parent / "profile.yaml"), *SHORT, *words]
    return json.loads(slurm.run(*command))["job_id"]


def tell(slurm: Slurm, job: str, run: Path, *, at_step: int, signal: str) -> None:
    """As Slurm does before the time limit: the batch script gets the signal. Returns when the job waits for a start."""
    starts = len(history(run))
    slurm.wait(f"step {at_step} of {run}", lambda: [step for step, _ in losses(run) if step >= at_step])
    slurm.run("scancel", "--batch", f"--signal={signal}", job)
    slurm.wait(f"an ending of {run}", lambda: len(history(run)) > starts)
    assert history(run)[-1]["ending"] == "requeue", log_of(run)
    slurm.wait("the job to wait again", lambda: slurm.state(job) == "PENDING")


def resize(slurm: Slurm, job: str, num_nodes: int) -> None:
    """What an administrator does, or Slurm itself within a range of nodes."""
    slurm.run("scontrol", "update", f"JobId={job}", f"NumTasks={num_nodes}")
    slurm.run("scontrol", "update", f"JobId={job}", f"NumNodes={num_nodes}-{num_nodes}")


def check_plans(run: Path, nodes: list[int]) -> None:
    """Each start had another plan than the one before, for the nodes that were there: a rank on each."""
    starts = history(run)
    plans = [load_plan(run / start["plan"]) for start in starts]
    assert [start["nodes"] for start in starts] == [plan.world_size for plan in plans] == nodes
    assert all(after != before for before, after in itertools.pairwise(plans))
    made = {start["plan"] for start in starts} - {"plan.yaml"}
    log = "".join(path.read_text(errors="replace") for path in run.glob("slurm-*.log"))
    assert made and log.count("mosaic plan --like") == len(made), "plans that the job made itself, each once"


def largest_difference(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> float:
    """Of the losses of two runs, relative; the same steps, each once."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    return max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_a_job_goes_on_under_a_new_plan_as_one_that_nobody_stops(slurm, tmp_path) -> None:
    """2 nodes under srun, told to end, then 1 node with a plan of its own; against 2 nodes under torchrun."""
    plan, steps = write_plan(tmp_path, 2), 6
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    other = submit(slurm, plan, whole, "launcher=torchrun", f"train.train_iters={steps}")
    job = submit(slurm, plan, cut, f"train.train_iters={steps}")
    tell(slurm, job, cut, at_step=2, signal="TERM")
    resize(slurm, job, 1)
    assert slurm.wait_for_end(other, whole) == "COMPLETED", log_of(whole)
    assert slurm.wait_for_end(job, cut) == "COMPLETED", log_of(cut)
    first, second = history(cut)
    assert second["plan"] == "plan-1-nodes.yaml"
    assert (second["from_step"], second["to_step"], second["ending"]) == (first["to_step"], steps, "done")
    check_plans(cut, [2, 1])
    difference = largest_difference(losses(cut), losses(whole))
    print(f"largest relative difference of the losses: {difference:.2g}")
    assert difference <= 1e-6


SCRIPT = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit({status})\ntime.sleep(30)\n"


@pytest.mark.slow
@pytest.mark.parametrize(("status", "ending"), [(1, "crashed"), (93, "stopped")])
def test_a_crash_and_a_rank_that_says_so_end_the_job(slurm, tmp_path, status, ending) -> None:
    """srun's own status is 143 both times: it ends the other rank."""
    run, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(SCRIPT.format(status=status))
    job = submit(slurm, write_plan(tmp_path, 2), run, f"launcher.script={script}", "train.train_iters=5")
    assert slurm.wait_for_end(job, run) == "FAILED", log_of(run)
    assert [start["ending"] for start in history(run)] == [ending], log_of(run)
    assert history(run)[0]["cause"].startswith("rank 1, start-up; flight files: "), "under srun, too"
    assert f"ExitCode={status}:0" in slurm.run("scontrol", "show", "job", job)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["srun", "torchrun"])
def test_four_nodes_two_and_four_again(slurm, tmp_path, form) -> None:
    """Signals at random steps, another number of nodes at each start, against a run on four nodes."""
    plan, steps = write_plan(tmp_path, 4), 24
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = [f"launcher={form}", f"train.train_iters={steps}"]
    job = submit(slurm, plan, whole, *words)
    assert slurm.wait_for_end(job, whole) == "COMPLETED", log_of(whole)
    job = submit(slurm, plan, cut, *words)
    draw = random.Random(17)
    for at_step, signal, nodes in ((draw.randint(2, 6), "USR1", 2), (draw.randint(11, 15), "USR2", 4)):
        tell(slurm, job, cut, at_step=at_step, signal=signal)
        resize(slurm, job, nodes)
    assert slurm.wait_for_end(job, cut) == "COMPLETED", log_of(cut)
    check_plans(cut, [4, 2, 4])
    difference = largest_difference(losses(cut), losses(whole))
    print(f"{form}: largest relative difference of the losses: {difference:.2g}")
    assert difference <= 1e-6


@pytest.mark.slow
def test_a_cancelled_job_and_one_that_has_restarted_enough_are_not_started_again(slurm, tmp_path) -> None:
    plan, cancelled, worn_out = write_plan(tmp_path, 2), tmp_path / "cancelled", tmp_path / "worn_out"
    job = submit(slurm, plan, cancelled, "train.train_iters=500")
    slurm.wait("a step", lambda: losses(cancelled))
    slurm.run("scancel", job)
    assert slurm.wait_for_end(job, cancelled) == "CANCELLED"
    job = submit(slurm, plan, worn_out, "train.train_iters=500", "launcher.max_restarts=0")
    slurm.wait("a step", lambda: losses(worn_out))
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    assert slurm.wait_for_end(job, worn_out) == "FAILED"
    assert [start["ending"] for start in history(worn_out)] == ["too many restarts"]
