"""`run_forked` imports once and forks one process per rank: parity checks, calibration, tests (seconds to start)."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_mosaic.flight.line import DIRECTORY_VARIABLE
from megatron_mosaic.flight.parent import die_with_parent
from megatron_mosaic.flight.process import begin_flight
from megatron_mosaic.flight.suspects import find_suspect, read_states, render_states
from megatron_mosaic.flight.verdict import judge
from megatron_mosaic.launch import store
from megatron_mosaic.launch.failures import describe_exit, first_cause, rank_failure
from megatron_mosaic.launch.watch import Watch

_LOG_TAIL_LINES = 30


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
    with tempfile.TemporaryDirectory(prefix="mosaic-") as directory, store.listen() as listener:
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), DIRECTORY_VARIABLE: directory}
        shared |= {**store.environment(listener.getsockname()[1]), **(env or {})}
        inherited = (os.getpid(), listener, shared, directory)
        ranks = [
            context.Process(target=_enter_rank, args=(rank, *inherited, target, args)) for rank in range(world_size)
        ]
        # A rank must not destroy what it inherited: a process group's destructor waits for threads that only we have.
        # Nothing is unfrozen later: to look again at all that was ever imported takes longer than a small rank's step.
        gc.collect()
        gc.freeze()
        try:
            for process in ranks:
                process.start()
            served = store.serve(listener)  # after the fork: it has a thread
            _wait(ranks, directory, timeout_s)
            del served
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _wait(ranks: Sequence[BaseProcess], directory: str, timeout_s: float) -> None:
    """Wait for all ranks. RankFailure at the first that fails, whose heart stops, or that outlasts the time."""
    deadline, watch = time.monotonic() + timeout_s, Watch(directory)
    while any(process.is_alive() for process in ranks):
        time.sleep(0.02)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        silent = watch.find_silent()
        if silent is not None:
            report = render_states(read_states(directory))
            raise rank_failure(silent.rank, silent.why, directory, log=_log_tail(directory, silent.rank), report=report)
    states = read_states(directory)
    failures = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
    if failures:
        rank = first_cause(failures, directory)
        got = describe_exit(failures[rank]) if rank in failures else "still there when the others failed"
        raise rank_failure(rank, got, directory, log=_log_tail(directory, rank), report=render_states(states))
    running = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
    if running:
        suspect = find_suspect({rank: states[rank] for rank in running if rank in states})
        rank, why = (suspect.rank, f"; {suspect.why}") if suspect else (running[0], "")
        got = f"still running after {timeout_s:.0f} s{why}"
        raise rank_failure(rank, got, directory, log=_log_tail(directory, rank), report=render_states(states))


def with_command_line(arguments: Sequence[str], main: Callable[..., int], *args: Any) -> int:
    """`main(*args)` of a script that reads these arguments from `sys.argv`: a target for `run_forked`."""
    sys.argv[1:] = arguments
    return main(*args)


def _enter_rank(
    rank: int,
    parent: int,
    listener: Any,
    shared: Mapping[str, str],
    directory: str,
    target: Callable[..., object],
    args: Sequence[Any],
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler cleans up after the parent
    die_with_parent(parent)
    listener.close()  # or the port would outlive the parent
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(_log_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    out, streams = os.fdopen(1, "w", buffering=1, closefd=False), contextlib.ExitStack()
    streams.enter_context(contextlib.redirect_stdout(out))  # a test runner may have replaced them
    streams.enter_context(contextlib.redirect_stderr(out))
    code = 1
    flight = begin_flight(rank)
    try:
        result = target(*args)
        code = result if isinstance(result, int) else 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        judge(flight, error)  # before peers can notice
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no interpreter shutdown: a peer may be gone and its sockets half open


def _log_path(directory: str, rank: int) -> str:
    return str(Path(directory) / f"log-{rank:05d}")


def _log_tail(directory: str, rank: int) -> str:
    path = Path(_log_path(directory, rank))
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join("  | " + line for line in lines[-_LOG_TAIL_LINES:])
