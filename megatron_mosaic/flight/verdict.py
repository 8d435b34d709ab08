"""What a rank that fails says of it: itself, or the rank that it had been waiting for.

Its peers fail a moment later, when their connections close; so the first verdict of a host counts, and is stamped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mosaic.errors import MosaicError, RankFailure
from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.suspects import Suspect, find_gone, find_suspect, read_states, render_states

# How torch's stores, gloo and NCCL say that somebody else is at fault.
_TRANSPORT = re.compile(r"/gloo/|NCCL|monitoredBarrier")
_TRANSPORT_CLASSES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_WAITED_IN_VAIN = re.compile(r"timed? ?out", re.IGNORECASE)
# A connection closes before the peer's process is seen to be gone, or its own verdict to be there.
_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`rank` failed at `at_ns`. `follows`: because of another, which is `suspect` where one was found.

    `words`: of the rank at fault; `report`: what every rank of the host was doing.
    """

    rank: int
    at_ns: int
    follows: bool
    suspect: int | None
    why: str
    words: str
    report: str

    @property
    def cause(self) -> int:
        return self.rank if self.suspect is None else self.suspect


def judge(flight: Flight, error: BaseException) -> Verdict:
    """Whose failure this is, as the failing rank sees it now; stamped, unless this rank has failed already."""
    at_ns, follows = time.monotonic_ns(), is_follower(error)
    suspect = _find_suspect(flight, error) if follows and flight.directory else None
    return stamp(flight, at_ns=at_ns, follows=follows, suspect=suspect)


def stamp(flight: Flight, *, at_ns: int, follows: bool, suspect: Suspect | None = None, why: str = "") -> Verdict:
    """The verdict, in a file of its own where the flight has a directory; the older one if this rank has one."""
    states = read_states(flight.directory, flight.rank) if flight.directory else {}
    words = flight.last if suspect is None else "before start-up"
    if suspect is not None and suspect.rank in states:
        words = states[suspect.rank].line.words
    rank, why = (suspect.rank, suspect.why) if suspect else (None, why)
    report = render_states(states)
    verdict = Verdict(rank=flight.rank, at_ns=at_ns, follows=follows, suspect=rank, why=why, words=words, report=report)
    if flight.directory is None:
        return verdict
    path = verdict_path(flight.directory, flight.rank)
    try:
        with path.open("x") as file:
            file.write(json.dumps(asdict(verdict)))
    except FileExistsError:
        return _read(path) or verdict
    except OSError as error:  # no reason to hide the failure itself
        print(f"mosaic: {path}: {error}", file=sys.stderr)
    return verdict


@contextlib.contextmanager
def naming(flight: Flight) -> Iterator[None]:
    """Whatever fails inside becomes a RankFailure with the flight's words, unless it is an error for the user."""
    try:
        yield
    except MosaicError:
        raise
    except Exception as error:
        raise failure_of(flight, flight.last, error) from error


def failure_of(flight: Flight, where: str, error: BaseException) -> RankFailure:
    """The error to raise for `error` on this rank: it names the rank at fault, and what all ranks of the host did."""
    verdict = judge(flight, error)
    got = f"{type(error).__name__}: {error}"
    files = f"\n{name_files(flight)}" if flight.stays_at else ""
    if verdict.suspect is None:
        return RankFailure(
            f"rank {flight.rank}, {where}",
            got=f"{got}{files}",
            expected="the action to finish",
            fix="see the traceback above; if it says a connection closed, another rank failed first",
        )
    return RankFailure(
        f"rank {verdict.suspect}, {verdict.words}",
        got=f"{verdict.why}; rank {flight.rank}, {where}, waited for it: {got}\n{verdict.report}{files}",
        expected="every rank to come to what the others wait for",
        fix=fix_of_suspect(verdict.suspect),
    )


def name_files(flight: Flight) -> str:
    """Where to read what every rank of this host was doing; empty where nobody will find it."""
    return f"flight files: {flight.stays_at}" if flight.stays_at else ""


def fix_of_suspect(rank: int) -> str:
    """What to do about a rank that did not answer."""
    return f"look at rank {rank}: its output, its memory, its host; then start from the last checkpoint"


def is_follower(error: BaseException) -> bool:
    """Whether the error, or what caused it, says that a peer did not answer or went away."""
    return any(isinstance(link, ConnectionError) or _is_of_transport(link) for link in _chain(error))


def _waited_in_vain(error: BaseException) -> bool:
    """Whether it waited for its whole timeout: only then may a living rank be the suspect."""
    return any(_is_of_transport(link) and _WAITED_IN_VAIN.search(str(link)) for link in _chain(error))


def _is_of_transport(error: BaseException) -> bool:
    return type(error).__name__ in _TRANSPORT_CLASSES or bool(_TRANSPORT.search(str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _find_suspect(flight: Flight, error: BaseException) -> Suspect | None:
    assert flight.directory is not None
    in_vain = _waited_in_vain(error)
    deadline = time.monotonic() + (0.0 if in_vain else _PATIENCE_S)
    while True:
        # States first: a rank writes its verdict before it ends, so one that is gone here and has none was killed.
        states = read_states(flight.directory, flight.rank)
        earlier = [verdict for verdict in read_verdicts(flight.directory) if verdict.rank != flight.rank]
        for verdict in earlier:
            if verdict.suspect is not None or not verdict.follows:
                return Suspect(rank=verdict.cause, why=verdict.why or "it failed first: see its own message")
        spoken = {verdict.rank for verdict in earlier}
        states = {rank: state for rank, state in states.items() if rank not in spoken}
        expected = set(_ranks_of_this_host()) - spoken
        suspect = find_suspect(states, expected, flight.rank) if in_vain else find_gone(states, flight.rank)
        if suspect or time.monotonic() > deadline:
            return suspect
        time.sleep(0.05)


def _ranks_of_this_host() -> range:
    """The ranks that should have a line here; none where the others may be on other hosts."""
    local, world = (int(os.environ.get(key, "0")) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return range(world if local == world else 0)


def verdict_path(directory: str | Path, rank: int) -> Path:
    return Path(directory) / f"failed-{rank:05d}"


def read_verdicts(directory: str | Path) -> list[Verdict]:
    """All verdicts, the first first."""
    found = [verdict for path in Path(directory).glob("failed-*") if (verdict := _read(path))]
    return sorted(found, key=lambda verdict: verdict.at_ns)


def _read(path: Path) -> Verdict | None:
    """None while it is being written."""
    text = path.read_text()
    return Verdict(**json.loads(text)) if text.endswith("}") else None
