"""tp=2 against tp=1 with the same weights, in two gloo processes: loss and every gradient.

A replicated parameter must have the whole gradient on every tp rank; the worker compares it to the unsplit model's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.dist
def test_tp2_equals_tp1(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path / "store")],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, output in enumerate(outputs):
        assert f"rank {rank}: equal" in output, output[-4000:]
