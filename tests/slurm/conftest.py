"""A real Slurm of four virtual nodes, for the tests of this folder: started once, stopped with all of its jobs."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm

SCRIPT = Path(__file__).with_name("cluster.sh")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    directory = Path(tempfile.mkdtemp(prefix="mosaic-slurm-"))  # short: munge's socket has its name
    up = subprocess.run(["bash", str(SCRIPT), "up", str(directory), "4", "2"], capture_output=True, text=True)
    try:
        if up.returncode == 3:
            pytest.skip(up.stdout.strip())
        assert up.returncode == 0, up.stdout + up.stderr
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MOSAIC_"))}
        environment |= {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "MOSAIC_TIMEOUT_S": "60",
            "PYTHONPATH": str(ROOT),
        }
        yield Slurm(environment)
    finally:
        if (directory / "slurm.conf").exists():
            down = subprocess.run(["bash", str(SCRIPT), "down", str(directory)], capture_output=True, text=True)
            assert down.returncode == 0, down.stdout
        shutil.rmtree(directory, ignore_errors=True)
