"""The `mosaic` command in a forked child with limits on CPU seconds and memory: what came out, at what cost.

No interpreter starts for a case: the child inherits what the parent has imported.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.cli import main

CPU_LIMIT_S = 10  # a hard stop: SIGXCPU ends the child
MEMORY_LIMIT_BYTES = 2**30  # above what the parent holds
CRASHED = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one command ended. `status` is negative where a signal ended it; memory is what it grew by."""

    status: int
    cpu_s: float
    memory_bytes: int
    out: str
    err: str


def run_limited(
    words: Sequence[str | Path],
    directory: Path,
    *,
    before: Callable[[], object] = lambda: None,
    cpu_limit_s: int = CPU_LIMIT_S,
) -> Outcome:
    """Run `mosaic WORDS` in a child of this process, `before` first; `directory` takes its output."""
    out, err, held = directory / "stdout", directory / "stderr", directory / "held"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        held.write_text(str(_status_bytes("VmRSS")))  # less than the parent's: a fork maps no files that are only read
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit_s, cpu_limit_s + 1))
        os._exit(_in_child(list(map(str, words)), out, err, before))
    _, raw, usage = os.wait4(child, 0)
    return Outcome(
        status=os.waitstatus_to_exitcode(raw),
        cpu_s=usage.ru_utime + usage.ru_stime,
        memory_bytes=max(0, usage.ru_maxrss * 1024 - int(held.read_text())),
        out=out.read_text(encoding="utf-8", errors="replace"),
        err=err.read_text(encoding="utf-8", errors="replace"),
    )


def _in_child(words: list[str], out: Path, err: Path, before: Callable[[], object]) -> int:
    data = _status_bytes("VmData") + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    with _output_to(out, err):
        try:
            before()
            return main(words)
        except SystemExit as leave:
            return leave.code if isinstance(leave.code, int) else CRASHED
        except BaseException:
            traceback.print_exc()
            return CRASHED


@contextlib.contextmanager
def _output_to(out: Path, err: Path) -> Iterator[None]:
    with (
        out.open("w", encoding="utf-8") as stdout,
        err.open("w", encoding="utf-8", errors="backslashreplace") as stderr,
    ):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout, sys.stderr = stdout, stderr
        yield


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} in /proc/self/status")
