"""A process dies with its parent, also one that asks too late."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PARENT = """
import os, subprocess, sys
child = "import os, sys, time; from megatron_mosaic.flight.parent import die_with_parent\\n"
child += "print(os.getpid(), flush=True); sys.stdin.readline(); die_with_parent(int(sys.argv[1]))\\n"
child += "print(flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child, str(os.getpid())]).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("asks", ["in time", "too late"])
def test_a_child_dies_with_its_parent(asks) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, **pipes)
    child = psutil.Process(int(parent.stdout.readline()))
    if asks == "in time":
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stdout.readline()
    parent.kill()
    parent.wait()
    if asks == "too late":
        assert child.is_running()
        parent.stdin.write("\n")
        parent.stdin.flush()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
