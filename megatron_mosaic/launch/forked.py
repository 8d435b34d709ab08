"""`run_forked` imports once and forks one process per rank: parity checks, calibration, tests (seconds to start)."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mosaic.colocation.flight import DIRECTORY_VARIABLE, mark_failed
from megatron_mosaic.launch.failures import die_with_parent, first_cause, rank_failure

_LOG_TAIL_LINES = 30
_PORTS = (15_000, 32_768)  # Linux gives connections 32,768 and above, others 49,152


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
            rank = first_cause(failures, directory)
            raise rank_failure(rank, f"exit code {codes[rank]}", directory, _log_tail(directory, rank))
        if any(code is None for code in codes):
            slow = codes.index(None)
            raise rank_failure(slow, f"still running after {timeout_s:.0f} s", directory, _log_tail(directory, slow))


def with_command_line(arguments: Sequence[str], main: Callable[..., int], *args: Any) -> int:
    """`main(*args)` of a script that reads these arguments from `sys.argv`: a target for `run_forked`."""
    sys.argv[1:] = arguments
    return main(*args)


def _enter_rank(
    rank: int, shared: Mapping[str, str], directory: str, target: Callable[..., object], args: Sequence[Any]
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler cleans up after the parent
    die_with_parent()
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=shared["WORLD_SIZE"])
    log = os.open(_log_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    out, streams = os.fdopen(1, "w", buffering=1, closefd=False), contextlib.ExitStack()
    streams.enter_context(contextlib.redirect_stdout(out))  # a test runner may have replaced them
    streams.enter_context(contextlib.redirect_stderr(out))
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


def _log_path(directory: str, rank: int) -> str:
    return str(Path(directory) / f"log-{rank:05d}")


def _log_tail(directory: str, rank: int) -> str:
    lines = Path(_log_path(directory, rank)).read_text(errors="replace").splitlines()
    return "\n".join("  | " + line for line in lines[-_LOG_TAIL_LINES:])


def _free_port() -> int:
    """A free port below those that systems give to connections: none of the ranks' own takes it before it is used."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
