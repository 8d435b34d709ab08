"""patches/: they fit, and a script that is started without the run module computes the same."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core import datasets

from tests.adapters.llava_cases import ARGUMENTS, CHECKOUT, needs_checkout, write_plan

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
WORDS = ("--train-iters", "2", "--log-interval", "1", "--eval-iters", "0", "--eval-interval", "1000")


def check_patches(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "scripts" / "check_patches.sh")]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)


def test_every_patch_fits_and_says_why():
    run = check_patches(ROOT)
    assert run.returncode == 0, run.stderr
    for patch in PATCHES:
        head = patch.read_text().partition("--- a/")[0]
        assert all(f"{word}: " in head for word in ("Why", "Upstream", "Remove when", "Test"))
        assert f"{patch.name} applies" in run.stdout


def test_a_patch_that_does_not_fit_is_named(tmp_path):
    for part in ("patches", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part)
    broken = tmp_path / "patches" / PATCHES[1].name
    broken.write_text(broken.read_text().replace(" def pretrain(", " def pretrain_otherwise("))
    run = check_patches(tmp_path)
    assert run.returncode == 1
    assert f"{broken.name} does not apply" in run.stderr


def patched_checkout(directory: Path) -> None:
    """A copy of what pretrain_vlm.py needs of a checkout, with all patches, its C++ built as the wheel's is."""
    shutil.copytree(Path(CHECKOUT) / "megatron", directory / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for script in Path(CHECKOUT).glob("*.py"):
        shutil.copy(script, directory)
    for built in Path(datasets.__file__).parent.glob("helpers_cpp*.so"):
        shutil.copy(built, directory / "megatron" / "core" / "datasets")
    (directory / "examples").symlink_to(Path(CHECKOUT) / "examples")
    for patch in PATCHES:
        subprocess.run(["git", "apply", str(patch)], cwd=directory, check=True)


def train(directory: Path, ranks: int, start: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = f"torchrun --nproc-per-node {ranks} {start} {shlex.join([*ARGUMENTS, *WORDS, *words])}"
    return subprocess.run(
        command, shell=True, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )


def read_losses(run: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return re.findall(r"lm loss: (\S+) .*grad norm: (\S+)", run.stdout)


@needs_checkout
@pytest.mark.slow
def test_a_patched_script_computes_what_the_run_module_computes(tmp_path):
    patched_checkout(tmp_path)
    write_plan(tmp_path, {"vision": "ranks: 0-1, layout: {dp: 2}", "llm": "ranks: 0-1, layout: {tp: 2}"}, world_size=2)
    under_plan = ("--mosaic-plan", "plan.yaml")
    patched = read_losses(train(tmp_path, 2, "pretrain_vlm.py", *under_plan))
    assert patched == read_losses(train(tmp_path, 2, "-m megatron_mosaic.run pretrain_vlm.py", *under_plan))
    assert len(patched) == 2


@needs_checkout
@pytest.mark.slow
def test_a_wrong_plan_ends_a_patched_script_with_a_sentence(tmp_path):
    patched_checkout(tmp_path)
    plan = {"vision": "ranks: 0, layout: {}", "llm": "ranks: 0, layout: {}", "sound": "ranks: 0, layout: {}"}
    write_plan(tmp_path, plan, world_size=1)
    command = [sys.executable, "pretrain_vlm.py", *ARGUMENTS, *WORDS, "--mosaic-plan", "plan.yaml"]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "sound" in run.stderr and "Traceback" not in run.stderr
