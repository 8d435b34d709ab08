"""`run_torchrun` starts torchrun as a user would call it (training); as a script, this file is that torchrun.

Every rank gets a flight file, so that even a killed rank's lane and action can be named.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import psutil

from megatron_mosaic.errors import ConfigError, MosaicError, RankFailure
from megatron_mosaic.flight.line import DIRECTORY_VARIABLE, Flight, Line, read_lines
from megatron_mosaic.flight.parent import die_with_parent
from megatron_mosaic.flight.suspects import is_stopped
from megatron_mosaic.flight.verdict import read_verdicts, stamp
from megatron_mosaic.launch.failures import describe_exit, first_cause, rank_failure
from megatron_mosaic.launch.store import LOOPBACK, RENDEZVOUS, interfaces
from megatron_mosaic.launch.watch import Watch
from megatron_mosaic.launch.worker import PARENT_VARIABLE

_MESSAGE_LINES = 4  # of a MosaicError
_REJECTED = 2  # exit status of argparse, and of our scripts for wrong input
_LOGS = "worker-logs"
_CAUSE_FILE = "first-failure.json"


def run_torchrun(
    world_size: int,
    arguments: Sequence[str],
    *,
    output: IO[str] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run `python ARGUMENTS` under torchrun on this machine; `watch` is called about twice a second.

    `output` takes what the workers print (default: our own stdout). ConfigError if the first worker that failed
    rejected its arguments (exit status 2, before its first step), RankFailure if it failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="mosaic-") as directory:
        command = [sys.executable, "-m", "megatron_mosaic.launch.torchrun"]
        command += ["--rdzv-backend", RENDEZVOUS, "--rdzv-endpoint", LOOPBACK, "--local-addr", LOOPBACK]
        # Everything is shown and kept, without a prefix: the template is the role, and the role is empty.
        command += ["--tee", "3", "--log-dir", str(Path(directory) / _LOGS), "--role", ""]
        command += ["--nproc-per-node", str(world_size), "-m", "megatron_mosaic.launch.worker", *arguments]
        env = interfaces() | os.environ | {DIRECTORY_VARIABLE: directory}
        env["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "${role_name}"
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("PYTHONUNBUFFERED", "1")  # lines appear when they are printed, and survive a crash
        parent = os.getpid()
        job = subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            process_group=0,  # an interrupt from the terminal is ours to pass on
            preexec_fn=lambda: die_with_parent(parent, signal.SIGTERM),
        )
        try:
            _wait(job, directory, watch)
        finally:
            _stop(job, directory)
        if job.returncode:
            raise _failure(job.returncode, directory)


def _wait(job: subprocess.Popen[bytes], directory: str, watch: Callable[[], None]) -> None:
    """Until torchrun ends. It asks workers to end, and a stopped one does not hear: whoever is to blame, we kill."""
    eye = Watch(directory)
    while job.poll() is None:
        time.sleep(0.5)
        watch()
        silent = eye.find_silent()
        if silent is not None:  # the others do not know
            stamp(Flight(silent.rank, directory), at_ns=time.monotonic_ns(), follows=True, suspect=silent)
        for verdict in read_verdicts(directory)[:1]:
            if verdict.suspect is not None:
                _kill(read_lines(directory).get(verdict.suspect), job.pid)


def _stop(job: subprocess.Popen[bytes], directory: str) -> None:
    """End torchrun, if we are leaving early; it ends its workers, except those that are stopped."""
    if job.poll() is None:
        job.terminate()
    while job.poll() is None:
        for line in read_lines(directory).values():
            if line.pulse is not None and is_stopped(line.pulse.pid):
                _kill(line, job.pid)
        time.sleep(0.1)


def _kill(line: Line | None, parent: int) -> None:
    """Kill the line's process, if it is this parent's child."""
    if line is not None and line.pulse is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(line.pulse.pid)
            if process.ppid() == parent:
                process.kill()


def _failure(status: int, directory: str) -> MosaicError:
    """What went wrong in a job that ended with this status."""
    cause = Path(directory) / _CAUSE_FILE
    if not cause.exists():
        return RankFailure(
            "torchrun",
            got=describe_exit(status),
            expected="to end after its workers",
            fix="see its last output above; if it was killed, look for who did: memory, a time limit",
        )
    rank, code = json.loads(cause.read_text())
    line = read_lines(directory).get(rank)
    if code == _REJECTED and line is not None and line.words.startswith("step "):  # not its input: a full disk, say
        return rank_failure(rank, _last_message(directory, rank), directory)
    if code == _REJECTED:
        return ConfigError(
            "arguments of the workers",
            got=_last_message(directory, rank),
            expected="arguments that the script and Megatron accept",
            fix="correct them; the whole message stands above",
        )
    return rank_failure(rank, describe_exit(code), directory)


def torchrun(arguments: Sequence[str]) -> int:
    """torchrun itself; leaves behind which rank failed first, and its exit status, beside the flight files."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megatron_mosaic.launch import rendezvous

    rendezvous.register()
    directory, launcher = os.environ[DIRECTORY_VARIABLE], os.getppid()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = first_cause(codes, directory)
        (Path(directory) / _CAUSE_FILE).write_text(json.dumps([rank, codes.get(rank, 0)]))
        return 1
    except SignalException as told:  # its workers have ended
        return 128 + told.sigval
    finally:
        if os.getppid() != launcher:  # it was killed, and cleans up no more
            shutil.rmtree(directory, ignore_errors=True)
    return 0


def _last_message(directory: str, rank: int) -> str:
    """What the rank said last on stderr: the message after argparse's `error:`, or its last lines."""
    logs = sorted(Path(directory).glob(f"{_LOGS}/*/attempt_0/{rank}/stderr.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if ": error: " in line:
            return line.partition(": error: ")[2]
    return "\n".join(lines[-_MESSAGE_LINES:]) or f"exit status {_REJECTED}"


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
