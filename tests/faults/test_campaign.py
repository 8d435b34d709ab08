"""Every kind of fault at every moment ends the run in time, names rank, lane and action, and leaves nothing behind.

A few cells run in every suite, on forked ranks. All of them, under torchrun, with the table of how each ended:
    pytest -q -s -m slow tests/faults/test_campaign.py
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.campaign import HEADER, STEPS, Launch, Outcome, forked, run_with_fault, torchrun

pytestmark = pytest.mark.dist

MOMENTS = {  # what the faulty rank notes then, and the checkpoint before
    "set-up": (r"set-up: model", None),
    "first collective": (r"step 1 lane vision\.0 action vision\.0F", None),
    "middle": (r"step 3 lane llm\.1 action llm\.1B", 2),
    "during save": (r"step 4 lane ~save action ~save", 2),
    "last step": (r"step 4 lane ~optimizer action ~optimizer", 2),
}
ENDINGS = {  # kind -> how its error begins
    "SIGKILL": r"killed by SIGKILL",
    "SIGSTOP": r"no sign of life for \d+ s \(its process is stopped\)",
    "hang": r"it does not wait, it runs at \S+ \(injection\.py:\d+\), for \d+ s: slow, or hung",
    "raise": r"exit code 1",
}
PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024
FIRST_LOSS = {1: "first collective", 3: "middle", 4: "last step"}


def run_dying(launch: Launch, directory: Path, kind: str, moment: str) -> Outcome:
    """A rank that dies, stops, hangs or raises is named, with what it was at."""
    words, last_good = MOMENTS[moment]
    outcome = run_with_fault(launch, directory, kind, words)
    assert outcome.exit_status == 1, outcome
    assert re.match(rf"rank 1, {words}", outcome.error.where), outcome.error
    assert re.match(ENDINGS[kind], outcome.error.got), outcome.error
    assert outcome.last_good == last_good, outcome
    return outcome


def run_nan(launch: Launch, directory: Path, step: int) -> Outcome:
    """A loss that is not a number ends the run before anything is stepped.

    Megatron looks for it from its second step on, tries the step again, and saves what was before it.
    """
    outcome = run_with_fault(launch, directory, "NaN", rf"step {step} lane llm\.1 action llm\.1F")
    assert outcome.exit_status == 1, outcome
    lane, words = ("~grads", "Unexpected result nan on rank") if step > 1 else ("~optimizer", "FloatingPointError")
    assert re.match(rf"rank \d, step {step} lane {lane} action {lane}", outcome.error.where), outcome.error
    assert words in str(outcome.error), outcome.error
    assert outcome.last_good == (step - 1 or None), outcome
    return outcome


def run_slow(launch: Launch, directory: Path) -> Outcome:
    """A slow rank is waited for, and nobody is blamed."""
    outcome = run_with_fault(launch, directory, "slow", MOMENTS["first collective"][0])
    assert outcome.error is None, outcome.error
    assert outcome.last_good == STEPS, outcome
    return outcome


def run_with_taken_port(launch: Launch, directory: Path) -> Outcome:
    """Where the ranks themselves make the store (srun, torchrun with a static port), a taken port is wrong input."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        env = {"MASTER_PORT": str(taken.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        outcome = run_with_fault(launch, directory, env=env)
    assert "exit code 2" in outcome.error.got, outcome.error
    assert re.search(r"MASTER_PORT of 127\.0\.0\.1\n.*another program listens at", outcome.error.got), outcome.error
    return outcome


def run_on_full_disk(launch: Launch, directory: Path) -> Outcome:
    """The first checkpoint fits, the second does not: half of it has room."""
    assert run_with_fault(launch, directory).error is None
    one = directory / "checkpoints" / f"iter_{STEPS:07d}"
    with small_disk(directory / "disk", kilobytes=3 * pages(one) // 2 * PAGE_KB) as disk:
        outcome = run_with_fault(launch, directory, save=disk / "checkpoints")
    assert outcome.exit_status == 1, outcome
    assert "No space left on device" in str(outcome.error), outcome.error
    assert re.match(r"rank \d, step 4 lane ~save action ~save", outcome.error.where), outcome.error
    assert outcome.last_good == 2, outcome
    return outcome


def pages(folder: Path) -> int:
    """What the folder's files take of a file system in memory."""
    return sum(-(-path.stat().st_size // (1024 * PAGE_KB)) for path in folder.rglob("*") if path.is_file())


def run_on_read_only_directory(launch: Launch, directory: Path) -> Outcome:
    """Nothing can be written where checkpoints shall go."""
    with small_disk(directory / "disk", kilobytes=100, options=",ro") as disk:
        outcome = run_with_fault(launch, directory, save=disk / "checkpoints")
    assert outcome.exit_status > 0, outcome
    assert "Read-only file system" in str(outcome.error), outcome.error
    assert outcome.last_good is None, outcome
    return outcome


def run_from_torn_metadata(launch: Launch, directory: Path) -> Outcome:
    """The last checkpoint is damaged: the run says so, and which one is whole."""
    assert run_with_fault(launch, directory).error is None
    save = directory / "checkpoints"
    torn = save / f"iter_{STEPS:07d}" / ".metadata"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    outcome = run_with_fault(launch, directory, words=("--load", str(save)))
    assert outcome.exit_status > 0, outcome
    assert "--ckpt-step 2" in str(outcome.error), outcome.error
    assert outcome.last_good == 2, outcome
    return outcome


@contextlib.contextmanager
def small_disk(place: Path, *, kilobytes: int, options: str = "") -> Iterator[Path]:
    """A file system of this size; the test is skipped where none may be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k{options}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# (fault, moment) -> its run. The port is taken where nobody's launcher chose it: forked ranks.
CELLS: dict[tuple[str, str], Callable[[Launch, Path], Outcome]] = {
    **{
        (kind, moment): lambda launch, directory, cell=(kind, moment): run_dying(launch, directory, *cell)
        for kind in ENDINGS
        for moment in MOMENTS
    },
    **{
        ("NaN", moment): lambda launch, directory, step=step: run_nan(launch, directory, step)
        for step, moment in FIRST_LOSS.items()
    },
    ("slow rank (5x)", "from the first collective"): run_slow,
    ("port taken", "set-up"): lambda launch, directory: run_with_taken_port(forked, directory),
    ("full disk", "during save"): run_on_full_disk,
    ("read-only directory", "set-up"): run_on_read_only_directory,
    ("torn metadata", "set-up"): run_from_torn_metadata,
}
IN_EVERY_SUITE = [
    ("SIGKILL", "during save"),
    ("SIGSTOP", "middle"),
    ("hang", "set-up"),
    ("NaN", "last step"),
    ("slow rank (5x)", "from the first collective"),
    ("port taken", "set-up"),
]


@pytest.mark.parametrize("cell", IN_EVERY_SUITE, ids=", ".join)
def test_a_fault_ends_the_run_and_is_named(tmp_path, cell) -> None:
    assert CELLS[cell](forked, tmp_path).orphans == 0


@pytest.fixture(scope="module")
def table() -> None:
    """The head of the table whose rows the tests print."""
    sys.__stdout__.write(f"\n{HEADER}\n")


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=", ".join)
def test_campaign(tmp_path, capsys, table, cell) -> None:
    outcome = CELLS[cell](torchrun, tmp_path)
    with capsys.disabled():
        print(outcome.as_row(*cell), flush=True)
    assert outcome.orphans == 0
