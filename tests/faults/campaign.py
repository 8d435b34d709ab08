"""Fault x moment: runs one training with a fault, forked or under torchrun, and records how it ended."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_mosaic.errors import MosaicError, RankFailure
from megatron_mosaic.flight.process import TIMEOUT_VARIABLE
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.launch.torchrun import run_torchrun
from megatron_mosaic.runtime.checkpoint import inspect_checkpoint
from tests.faults import injection
from tests.faults.injection import Fault
from tests.numerics import parity_cases as cases

STEPS, SAVE_INTERVAL, TIMEOUT_S = 4, 2, 7.0
FAULTY = 1  # the rank: it has both a first and a last stage, sends and waits
PLAN = cases.any2any_plan(("0-1", cases.Layout(dp=2)), ("0-1", cases.Layout(pp=2)), ("1", cases.Layout()), world_size=2)
COMMAND = ["--lr", "1e-2", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0.0", "--eval-iters", "0"]
COMMAND += ["--train-iters", str(STEPS), "--save-interval", str(SAVE_INTERVAL), "--log-interval", "1"]
NEVER = "$^"

Launch = Callable[[list[str], Mapping[str, str], Path], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`seconds`: from the fault (from the start, if none was put in) until all its processes were gone."""

    error: MosaicError | None
    seconds: float
    orphans: int
    last_good: int | None

    @property
    def exit_status(self) -> int:
        """Of the `mosaic` command."""
        if self.error is None:
            return 0
        return 1 if isinstance(self.error, RankFailure) else 2

    @property
    def named(self) -> str:
        """Rank, lane and action, or the words before there is a lane."""
        if self.error is None:
            return ""
        found = re.match(r"(rank \d+), .*lane (\S+) action (\S+)", self.error.where)
        return f"{found[1]}, {found[2]}, {found[3]}" if found else self.error.where

    def as_row(self, kind: str, moment: str) -> str:
        """One line of the table."""
        cells = [kind, moment, f"{self.seconds:.0f}", str(self.exit_status), self.named or "nobody", str(self.orphans)]
        return f"| {' | '.join([*cells, str(self.last_good or 'none')])} |"


HEADER = """| fault | moment | ended in s | exit | named | processes left | last good checkpoint |
|---|---|---|---|---|---|---|"""


def forked(words: list[str], env: Mapping[str, str], directory: Path) -> None:
    """Ranks forked from this process, as `mosaic check` has them."""
    run_forked(PLAN.world_size, with_command_line, words, injection.main, env=env)


def torchrun(words: list[str], env: Mapping[str, str], directory: Path) -> None:
    """Workers of torchrun, as `mosaic train` has them."""
    with (directory / "log").open("a") as output, _environment(env):
        run_torchrun(PLAN.world_size, [injection.__file__, *words], output=output)


def run_with_fault(
    launch: Launch,
    directory: Path,
    kind: str = "none",
    moment: str = NEVER,
    *,
    save: Path | None = None,
    words: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """One training of STEPS steps that saves every SAVE_INTERVAL; the fault comes when the rank's words match."""
    save = save or directory / "checkpoints"
    mark = directory / f"fault-{time.monotonic_ns()}"
    fault = Fault(kind=kind, rank=FAULTY, moment=moment, mark=str(mark))
    env = {TIMEOUT_VARIABLE: str(TIMEOUT_S), **fault.as_environment(), **(env or {})}
    begin, error = time.monotonic(), None
    try:
        launch([*COMMAND, "--mosaic-plan", cases.written(PLAN, directory), "--save", str(save), *words], env, directory)
    except MosaicError as failure:
        error = failure
    orphans = _count_left(mark)
    seconds = time.monotonic() - (float(mark.read_text()) if mark.exists() else begin)
    return Outcome(error=error, seconds=seconds, orphans=orphans, last_good=find_last_good(save))


def find_last_good(save: Path) -> int | None:
    """The latest iteration that a run could go on from."""
    steps = sorted((int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")), reverse=True)
    for step in steps:
        with contextlib.suppress(MosaicError), contextlib.redirect_stdout(io.StringIO()):
            saved = inspect_checkpoint(str(save), step, cases.WORKLOAD)
            if saved is not None and saved.manifest is not None:
                return saved.manifest.iteration
    return None


def _count_left(mark: Path) -> int:
    """Ranks that are still there a moment later: a killed process takes one."""
    pids = [int(path.read_text()) for path in mark.parent.glob(f"{mark.name}.pid-*")]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=3)
    return len(alive)


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
