"""The flight of this process: begun once, as early as the process knows its rank."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.flight.directory import make_directory, remove_directory
from megatron_mosaic.flight.farewell import Farewell, told_path
from megatron_mosaic.flight.heart import Heart
from megatron_mosaic.flight.line import DIRECTORY_VARIABLE, Flight, line_path
from megatron_mosaic.flight.parent import die_with_parent
from megatron_mosaic.flight.suspects import FINISHED
from megatron_mosaic.flight.verdict import verdict_path

TIMEOUT_VARIABLE = "MOSAIC_TIMEOUT_S"  # wins over Megatron's minutes: seconds, for small jobs and tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A flight with a beating heart. `is_own`: no launcher of ours watches it, and nobody else cleans up."""

    pid: int
    flight: Flight
    heart: Heart
    is_own: bool


_begun: Begun | None = None


def begin_early() -> None:
    """Begin the flight before arguments are read, if the environment says which rank this is."""
    rank = os.environ.get("RANK")
    if rank is not None:
        begin_flight(int(rank))


def begin_flight(rank: int) -> Flight:
    """The flight of this process, with a beating heart; the one that it has, if it has begun one."""
    global _begun
    if _begun is None or _begun.pid != os.getpid():  # a forked process has no heart of its own
        is_own = DIRECTORY_VARIABLE not in os.environ
        directory = os.environ[DIRECTORY_VARIABLE] = make_directory()
        for path in (line_path(directory, rank), verdict_path(directory, rank), told_path(directory)):
            path.unlink(missing_ok=True)  # of an earlier job with the same name
        flight = Flight(rank, directory, stays=is_own)
        _begun = Begun(pid=os.getpid(), flight=flight, heart=Heart(rank, directory), is_own=is_own)
        if is_own:
            _stand_alone(_begun.flight)
    return _begun.flight


def flight_of(rank: int) -> Flight:
    """The process's flight, if it has begun one as this rank; else a new one."""
    is_ours = _begun is not None and _begun.pid == os.getpid() and _begun.flight.rank == rank
    return _begun.flight if _begun is not None and is_ours else Flight(rank)


def _stand_alone(flight: Flight) -> None:
    """What a launcher of ours would do: the rank dies with torchrun, and says who died before it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        Farewell(flight)


def noted[**P, R](words: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the flight's words while the function runs; they stay if it fails. `{1}` is its argument 1."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def during(*args: P.args, **kwargs: P.kwargs) -> R:
            with _begun.flight.during(words.format(*args)) if _begun is not None else contextlib.nullcontext():
                return function(*args, **kwargs)

        return during

    return decorate


def watch_threads(threads: Collection[int], waiting_room: str) -> None:
    """Let the heart, if there is one, look at these threads beside the main one: see `Heart.watch`."""
    if _begun is not None:
        _begun.heart.watch(threads, waiting_room)


def end_flight() -> None:
    """The work is done: whoever reads the line sees it, and without a launcher nothing is left to read."""
    if _begun is None or _begun.flight.directory is None:
        return
    _begun.flight.note(FINISHED)
    if _begun.is_own:
        line_path(_begun.flight.directory, _begun.flight.rank).unlink(missing_ok=True)
        remove_directory(_begun.flight.directory)


def collective_timeout(minutes: float) -> timedelta:
    """How long a rank waits for others before it fails: Megatron's `--distributed-timeout-minutes`, unless seconds are
    given in the environment. The heart learns of it.
    """
    given = os.environ.get(TIMEOUT_VARIABLE)
    try:
        seconds = float(given) if given else 60.0 * minutes
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"${TIMEOUT_VARIABLE}", got=given, expected="seconds above 0", fix="correct it, or unset it")
    if _begun is not None:
        _begun.heart.expect(seconds)
    return timedelta(seconds=seconds)
