"""Starts the ranks of a plan on this machine and says which one failed, where.

    run_forked   imports once, forks one process per rank: parity checks, calibration, tests (seconds to start)
    run_torchrun torchrun as a user would call it: training
Both give every rank a flight file, so that even a killed rank's lane and action can be named.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_mosaic.colocation.flight import DIRECTORY_VARIABLE, failed_at_ns, mark_failed, read_flights
from megatron_mosaic.errors import ConfigError, RankFailure

_LOG_TAIL_LINES = 30
_MESSAGE_LINES = 4  # of a MosaicError
_REJECTED = 2  # exit status of argparse, and of our scripts for wrong input
_LOGS = "worker-logs"
_CAUSE_FILE = "first-failure.json"
_PORTS = (15_000, 32_768)  # Linux gives connections 32,768 and above, others 49,152
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_forked(
    world_size: int,
    target: Callable[..., object],
    *args: Any,
    timeout_s: float = 600.0,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run `target(*args)` in `world_size` forked processes with torchrun's environment variables.

    Import what `target` needs before the call: children inherit it. RankFailure names the rank that failed first,
    with its last lane and action and the end of its output; the others are stopped.
    """
    distributed = sys.modules.get("torch.distributed")
    assert distributed is None or not distributed.is_initialized(), "forked ranks would inherit a process group"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mosaic-") as directory:
        shared = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            DIRECTORY_VARIABLE: directory,
            **(env or {}),
        }
        ranks = [
            context.Process(target=_enter_rank, args=(rank, shared, directory, target, args))
            for rank in range(world_size)
        ]
        # A rank must not destroy what it inherited: a process group's destructor waits for threads that only we have.
        gc.collect()
        gc.freeze()
        try:
            for process in ranks:
                process.start()
        finally:
            gc.unfreeze()
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.is_alive() for process in ranks):
                failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        failures = {rank: code for rank, code in enumerate(codes) if code}
        if failures:
            rank = _first_cause(failures, directory)
            raise rank_failure(rank, f"exit code {codes[rank]}", directory, _log_tail(directory, rank))
        if any(code is None for code in codes):
            slow = codes.index(None)
            raise rank_failure(slow, f"still running after {timeout_s:.0f} s", directory, _log_tail(directory, slow))


def with_command_line(arguments: Sequence[str], main: Callable[..., int], *args: Any) -> int:
    """`main(*args)` of a script that reads these arguments from `sys.argv`: a target for `run_forked`."""
    sys.argv = [sys.argv[0], *arguments]
    return main(*args)


def run_torchrun(
    world_size: int,
    arguments: Sequence[str],
    *,
    output: IO[str] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run `python ARGUMENTS` under torchrun on this machine; `watch` is called about twice a second.

    `output` takes what the workers print (default: our own stdout). ConfigError if the first worker that failed
    rejected its arguments (exit status 2), RankFailure if it failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="mosaic-") as directory:
        command = [sys.executable, "-m", "megatron_mosaic.launch", "--standalone"]
        # Everything is shown and kept, without a prefix: the template is the role, and the role is empty.
        command += ["--tee", "3", "--log-dir", str(Path(directory) / _LOGS), "--role", ""]
        command += ["--nproc-per-node", str(world_size), *arguments]
        env = os.environ | {DIRECTORY_VARIABLE: directory, "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}"}
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("PYTHONUNBUFFERED", "1")  # lines appear when they are printed, and survive a crash
        job = subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            preexec_fn=lambda: _die_with_parent(signal.SIGTERM),
        )
        try:
            while job.poll() is None:
                time.sleep(0.5)
                watch()
        finally:
            if job.poll() is None:  # we are leaving early: torchrun stops its workers
                job.terminate()
                job.wait()
        if job.returncode:
            cause = Path(directory) / _CAUSE_FILE
            rank, code = json.loads(cause.read_text()) if cause.exists() else (0, None)
            if code == _REJECTED:
                raise ConfigError(
                    "arguments of the workers",
                    got=_last_message(directory, rank),
                    expected="arguments that the script and Megatron accept",
                    fix="correct them; the whole message stands above",
                )
            if code is None:
                got = f"exit code {job.returncode} of torchrun"
            else:
                got = f"killed by {signal.Signals(-code).name}" if code < 0 else "failed"
            raise rank_failure(rank, got, directory, all_ranks=True)


def torchrun(arguments: Sequence[str]) -> int:
    """torchrun itself; leaves behind which rank failed first, and its exit status, beside the flight files."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        directory = os.environ[DIRECTORY_VARIABLE]
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = _first_cause(codes, directory)
        (Path(directory) / _CAUSE_FILE).write_text(json.dumps([rank, codes[rank]]))
        if codes[rank] != _REJECTED:
            print(error, file=sys.stderr)
        return 1
    return 0


def rank_failure(rank: int, got: str, directory: str, log: str = "", *, all_ranks: bool = False) -> RankFailure:
    """The error that names a failed rank's lane and action; with `all_ranks`, everybody's."""
    flights = read_flights(directory)
    if all_ranks:
        log = "\n".join(f"  rank {r}: {line}" for r, line in sorted(flights.items()))
    return RankFailure(
        f"rank {rank}, {flights.get(rank, 'before start-up')}",
        got=got + (f"\n{log}" if log else ""),
        expected="every rank to finish",
        fix="look for the first traceback above; ranks whose connection closed are followers",
    )


def _enter_rank(
    rank: int, shared: Mapping[str, str], directory: str, target: Callable[..., object], args: Sequence[Any]
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler cleans up after the parent
    _die_with_parent()
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=shared["WORLD_SIZE"])
    log = os.open(_log_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # a test runner may have replaced them
    code = 1
    try:
        result = target(*args)
        code = result if isinstance(result, int) else 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        mark_failed(directory, rank)  # before peers can notice
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no interpreter shutdown: a peer may be gone and its sockets half open


def _first_cause(codes: Mapping[int, int], directory: str) -> int:
    """The rank whose failure made the others fail.

    A rank killed by a signal comes first, then the rank that raised first; those lost their peer, and a SIGTERM is the
    launcher's own, sent to whoever was left.
    """

    def key(rank: int) -> tuple[int, float]:
        code = codes[rank]
        kind = 2 if code == -signal.SIGTERM else int(code > 0)
        return kind, failed_at_ns(directory, rank)

    return min(codes, key=key)


def _die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process the signal when its parent dies, so that no rank outlives its launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number))


def _log_path(directory: str, rank: int) -> str:
    return str(Path(directory) / f"log-{rank:05d}")


def _log_tail(directory: str, rank: int) -> str:
    lines = Path(_log_path(directory, rank)).read_text(errors="replace").splitlines()
    return "\n".join("  | " + line for line in lines[-_LOG_TAIL_LINES:])


def _last_message(directory: str, rank: int) -> str:
    """What the rank said last on stderr: the message after argparse's `error:`, or its last lines."""
    logs = sorted(Path(directory).glob(f"{_LOGS}/*/attempt_0/{rank}/stderr.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if ": error: " in line:
            return line.partition(": error: ")[2]
    return "\n".join(lines[-_MESSAGE_LINES:]) or f"exit status {_REJECTED}"


def _free_port() -> int:
    """A free port below those that systems give to connections: none of the ranks' own takes it before it is used."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
