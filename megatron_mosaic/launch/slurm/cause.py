"""Who failed first in a job on several hosts: a sentence of every rank that failed, beside its exit status.

A rank's flight files are on its own host. What it found there before it ended goes to the run directory, which all
hosts see: the batch program can then name rank, lane and action.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.verdict import name_files, read_verdicts

_LEADS, _SUSPECTS, _FOLLOWS = "cause", "suspect", "follower"  # in this order they are believed


def note_cause(directory: str | Path, flight: Flight) -> None:
    """Leave what the rank's verdict says, where it has one. Its kind says how much it knows: it failed by itself,
    followed a rank that it suspects, or followed alone."""
    verdicts = read_verdicts(flight.directory) if flight.directory else []
    own = next((verdict for verdict in verdicts if verdict.rank == flight.rank), None)
    if own is None:
        return
    words = [f"rank {own.cause}, {own.words}", own.why, name_files(flight)]
    kind = _LEADS if not own.follows else _FOLLOWS if own.suspect is None else _SUSPECTS
    text = "; ".join(word for word in words if word)
    (Path(directory) / f"{kind}-{flight.rank:05d}").write_text(text + "\n", encoding="utf-8")


def read_cause(directory: str | Path) -> str:
    """The earliest sentence of a rank that failed by itself, else of one that suspects another, else of a follower;
    empty where nobody left one."""
    for kind in (_LEADS, _SUSPECTS, _FOLLOWS):
        found = list(Path(directory).glob(f"{kind}-*"))
        if found:
            first = min(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
            return first.read_text(encoding="utf-8").strip()
    return ""
