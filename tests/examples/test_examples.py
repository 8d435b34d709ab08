"""Every file of examples/ is one that works: plans load, models are planned for, scripts run to their end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mosaic.cli.main import main
from megatron_mosaic.config import load_workload
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.workload_file import load_workload_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PLANS = sorted(path for path in EXAMPLES.rglob("*.yaml") if "mosaic_plan:" in path.read_text())


def run_script(name: str, directory: Path, *, timeout_s: float) -> str:
    """What a script printed, run in a folder of its own with `mosaic` of these sources on its path."""
    program = directory / "bin" / "mosaic"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_mosaic.cli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(EXAMPLES / name)]
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_are_examples_and_the_page_names_them():
    page = (EXAMPLES / "README.md").read_text()
    unnamed = [path.name for path in EXAMPLES.iterdir() if path.name not in (page + "README.md")]
    assert unnamed == [] and len(PLANS) >= 4


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_plans_load(path):
    assert load_plan(str(path)).modules


def test_the_plan_in_the_readme_is_the_one_in_the_folder():
    assert (EXAMPLES / "plans" / "heterogeneous.yaml").read_text() in (ROOT / "README.md").read_text()


def test_the_own_model_is_planned_for_and_its_plan_is_legal(tmp_path):
    file = EXAMPLES / "own_model" / "model.yaml"
    out = tmp_path / "plan.yaml"
    assert main(["plan", f"model={file}", "cluster=h100_1x8", "search.max_tp=1", "--out", str(out), "--json"]) == 0
    assert load_plan(str(out)).modules.keys() == load_workload_file(file).by_name.keys()


def test_the_definition_is_as_short_as_said():
    lines = (EXAMPLES / "own_model" / "model.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class SensorReader"))
    assert len(lines) - start <= 45


@pytest.mark.slow
def test_the_tour_shows_a_refusal_and_goes_on(tmp_path):
    printed = run_script("tour.sh", tmp_path, timeout_s=120)
    assert "(exit status 2)" in printed and "fix:" in printed
    assert (tmp_path / "tour.html").stat().st_size > 10_000


@pytest.mark.slow
def test_72b_parameters_on_512_gpus(tmp_path):
    run_script("plan_72b.sh", tmp_path, timeout_s=300)
    plan = load_plan(str(tmp_path / "plan_72b.yaml"))
    assert plan.world_size == 512 and plan.modules.keys() == load_workload(["model=qwen2_vl_72b"]).by_name.keys()
