"""A directory in which a page's commands run as in the root of a clone that is set up, and leave the clone alone."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.docs.pages import ROOT, Block

OWN = {".git", ".venv", "outputs", "multirun", "runs"}  # of the clone, not to be seen or written to
STAMP = "mosaic-setup.stamp"


def build_sandbox(directory: Path) -> Path:
    """Links to everything in the root, and a `.venv` that `scripts/setup.sh` and `python` take as their own."""
    for path in ROOT.iterdir():
        if path.name not in OWN:
            (directory / path.name).symlink_to(path)
    environment = directory / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != STAMP:
            (environment / path.name).symlink_to(path)
    asked = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    (environment / STAMP).write_text(f"{directory}\n{hashlib.sha256(asked).hexdigest()}\n")
    return directory


def run_block(block: Block, directory: Path, *, timeout_s: float) -> str:
    """What the block printed. AssertionError where a command fails or the time is over."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MOSAIC_", "PYTEST_"))}
    environment |= {
        "PATH": f"{directory}/.venv/bin:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(directory),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        raise AssertionError(f"{block.where} was not done after {timeout_s:g} s:\n{printed}") from None
    assert process.returncode == 0, f"{block.where} ended with status {process.returncode}:\n{printed}"
    return printed


def is_found(mark: str) -> bool:
    """Whether blocks of this mark can run here."""
    if mark == "gpu":
        return _answers(["nvidia-smi", "-L"])
    if mark == "slurm":
        return _answers(["sinfo", "--noheader"])
    return mark == "megatron-lm" and bool(os.environ.get("MEGATRON_LM"))


def _answers(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
