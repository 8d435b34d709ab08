"""Whoever of a local job is killed, nothing of it is left; and nobody outside this machine hears it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.flight.line import Flight, Pulse, line_path
from megatron_mosaic.launch.torchrun import run_torchrun
from megatron_mosaic.launch.watch import Watch
from tests.forked import run_gloo

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, pathlib, sys, time
import torch.distributed as dist

dist.init_process_group("gloo")
dist.new_group([0, 1])
(pathlib.Path(sys.argv[1]) / os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.fixture
def job(tmp_path):
    """A directory in which two workers, once they have met, write their process ids; and their script."""
    (tmp_path / "met").mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def workers_of(job: Path) -> list[psutil.Process]:
    """The workers, as soon as both have met."""
    found = [path.read_text() for path in (job / "met").iterdir()]
    return [psutil.Process(int(pid)) for pid in found] if len(found) == 2 and all(found) else []


def listening(processes: list[psutil.Process]) -> list[tuple[str, str]]:
    """(command line, address) of every socket that waits for connections."""
    return [
        (" ".join(process.cmdline()), connection.laddr.ip)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def require_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_job_is_heard_on_the_loopback_alone_and_dies_with_its_torchrun(job) -> None:
    heard, workers = [], []

    def look_and_kill_torchrun() -> None:
        workers[:] = workers or workers_of(job)
        if workers and not heard:
            (torchrun,) = {worker.ppid() for worker in workers}
            heard.extend(listening([*psutil.Process().children(recursive=True)]))
            os.kill(torchrun, signal.SIGKILL)

    with (job / "log").open("w") as log, pytest.raises(RankFailure, match="killed by SIGKILL"):
        run_torchrun(2, [str(job / "worker.py"), str(job / "met")], output=log, watch=look_and_kill_torchrun)
    require_gone(workers)
    assert any("launch.torchrun" in command for command, _ in heard)
    assert any("launch.worker" in command for command, _ in heard)
    assert {address for _, address in heard} == {"127.0.0.1"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("told", [signal.SIGKILL, signal.SIGINT])
def test_a_job_dies_with_the_process_that_started_torchrun(job, told) -> None:
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    code = """
import signal, sys
from megatron_mosaic.launch.torchrun import run_torchrun
signal.signal(signal.SIGINT, signal.default_int_handler)
run_torchrun(2, sys.argv[1:])
"""
    (job / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(job / "tmp")}
    command = [sys.executable, "-c", code, str(job / "worker.py"), str(job / "met")]
    with (job / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    while not workers_of(job) and launcher.poll() is None:
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children(recursive=True)
    assert len(started) >= 3
    launcher.send_signal(told)
    launcher.wait(60)
    require_gone(started)
    assert not list((job / "tmp").glob("mosaic-*"))


def list_sockets_of_the_job() -> None:
    if dist.get_rank() == 0:
        dist.new_group([0])
        launcher = psutil.Process(os.getppid())
        heard = listening([launcher, *launcher.children()])
        assert len(heard) > 2
        assert {address for _, address in heard} == {"127.0.0.1"}, heard


def test_forked_ranks_are_heard_on_the_loopback_alone() -> None:
    run_gloo(2, list_sockets_of_the_job)


def test_a_pause_of_the_whole_job_is_no_silence(tmp_path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron_mosaic.launch.watch.time.monotonic", lambda: now[0])

    def beat() -> None:
        Flight(1, str(tmp_path))
        pulse = Pulse(host="any", pid=os.getpid(), born_ns=0, beat_ns=int(now[0] * 1e9), timeout_s=10.0)
        path = line_path(tmp_path, 1)
        path.write_bytes(path.read_bytes()[:256] + pulse.as_bytes())

    watch = Watch(str(tmp_path))
    beat()
    for passed in (1.0, 1000.0, 1.0):  # the launcher itself was stopped
        now[0] += passed
        assert watch.find_silent() is None
    beat()
    for _ in range(16):
        now[0] += 1.0
        assert watch.find_silent() is None
    now[0] += 1.0
    suspect = watch.find_silent()
    assert suspect is not None
    assert (suspect.rank, suspect.why) == (1, "no sign of life for 16 s: stopped, or stuck in foreign code")
