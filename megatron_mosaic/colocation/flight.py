"""What every rank is doing right now, in a small file that survives the rank.

A killed process cannot say where it was. Each rank keeps its current step and action in a memory-mapped file of one
line; whoever notices the death reads the files and names the lane and the action.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from pathlib import Path

LINE_BYTES = 256
DIRECTORY_VARIABLE = "MOSAIC_FLIGHT_DIR"


class Flight:
    """One rank's line, also in `last`. Without a directory no file is written."""

    def __init__(self, rank: int, directory: str | None = None) -> None:
        self._rank, self._directory = rank, directory or os.environ.get(DIRECTORY_VARIABLE)
        self._map: mmap.mmap | None = None
        self.last = "start-up"
        if self._directory:
            path = Path(self._directory) / f"rank-{rank:05d}"
            path.write_bytes(b" " * LINE_BYTES)
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), LINE_BYTES)
            self.note(self.last)

    def note(self, text: str) -> None:
        """Replace the line. A memory write: no system call, safe on the hot path."""
        self.last = text
        if self._map is not None:
            self._map[:] = text.encode()[:LINE_BYTES].ljust(LINE_BYTES)

    def fail(self, text: str) -> None:
        """The last line of a rank that is about to raise; stamped, because its peers will fail too, a moment later."""
        self.note(text)
        if self._directory:
            mark_failed(self._directory, self._rank)


def mark_failed(directory: str | Path, rank: int) -> None:
    """Stamp the rank's failure, unless it is stamped already."""
    path = Path(directory) / f"failed-{rank:05d}"
    if not path.exists():
        path.write_text(str(time.monotonic_ns()))


def failed_at_ns(directory: str | Path, rank: int) -> float:
    """When the rank said that it failed; infinity if it never did."""
    path = Path(directory) / f"failed-{rank:05d}"
    return float(path.read_text()) if path.exists() else math.inf


def read_flights(directory: str | Path) -> dict[int, str]:
    """Rank -> its last line, for every rank that wrote one."""
    files = sorted(Path(directory).glob("rank-*"))
    return {int(path.name.removeprefix("rank-")): path.read_bytes().decode(errors="replace").strip() for path in files}
