"""A sweep of the planner through Hydra's submitit launcher, its points jobs of Slurm: the table is the local one."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mosaic.plan.plan_file import load_plan
from tests.slurm.cluster import Slurm

pytest.importorskip("submitit", reason="Hydra's launcher for Slurm needs hydra-submitit-launcher")
pytestmark = pytest.mark.slow

WORDS = ("model=any2any-digits", "cluster=h100_1x8", "search.max_tp=1,2,4", "search.memory_frac=0.9,1e-09")
LAUNCHER = ("timeout_min=5", "nodes=1", "tasks_per_node=1", "cpus_per_task=1", "mem_gb=1", "array_parallelism=4")


def sweep(slurm: Slurm, directory: Path, *words: str) -> tuple[list[dict[str, str]], str]:
    """Rows of its table, without what differs from run to run; what it printed."""
    command = [sys.executable, "-m", "megatron_mosaic.search", "-m", *WORDS, f"hydra.sweep.dir={directory}", *words]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    with (directory / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "search_s"} for row in rows], done.stdout


def test_six_points_make_the_same_table_as_jobs_and_as_processes(slurm, tmp_path) -> None:
    """Half of them have no feasible plan: `inf`, and the sweep goes on."""
    here, _ = sweep(slurm, tmp_path / "local")
    words = [f"hydra.launcher.{word}" for word in LAUNCHER]
    there, said = sweep(slurm, tmp_path / "slurm", "hydra/launcher=submitit_slurm", *words)
    print(said)
    assert there == here and len(there) == 6
    jobs = list((tmp_path / "slurm" / ".submitit").glob("*/*_submission.sh"))
    results = list((tmp_path / "slurm" / ".submitit").glob("*/*_result.pkl"))
    assert jobs and len(results) == 6, "each point was a task of a job"
    infeasible = [row for row in there if math.isinf(float(row["step_s"]))]
    assert [row["search.memory_frac"] for row in infeasible] == ["1e-09"] * 3
    for row in there:
        path = tmp_path / "slurm" / row["point"] / "plan.yaml"
        assert path.exists() == (row not in infeasible)
        if row not in infeasible:
            assert load_plan(path) == load_plan(tmp_path / "local" / row["point"] / "plan.yaml")
    for column in ("search.max_tp", "step_s", "peak_bytes"):
        assert column in said, "printed, too"
    assert (tmp_path / "slurm" / "sweep.png").stat().st_size > 1000
