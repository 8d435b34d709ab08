"""What every rank is doing right now, in a small file that survives the rank.

    rank-00002   step 3 lane llm.0 action llm.0F3      the rank's words: a memory write per action, on the hot path
                 {"pid": 71, "beat_ns": ..., ...}      its heart's: from a thread, once a second (heart.py)

A killed process cannot say where it was, and a stopped one does not answer: whoever notices reads the files.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import ConfigError

WORDS_BYTES, PULSE_BYTES = 256, 1024
DIRECTORY_VARIABLE = "MOSAIC_FLIGHT_DIR"
WAIT = "wait"  # for a message that was posted before


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a rank's heart wrote with its last beat. Times are of the host's monotonic clock.

    `still_s`: for how long words and place had been the same. `waits_in`: the communication call that the rank waited
    in (or WAIT), "" if it ran something else; `peers`: for whom, if known. `timeout_s`: of its collectives.
    `words_crc`: of the words that the heart saw.
    """

    host: str
    pid: int
    born_ns: int
    beat_ns: int
    words_crc: int = 0
    still_s: float = 0.0
    waits_in: str = ""
    peers: tuple[int, ...] = ()
    place: str = ""
    timeout_s: float = math.inf

    def as_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one rank's file says. No pulse: its heart never beat."""

    rank: int
    words: str
    pulse: Pulse | None


class Flight:
    """One rank's words, also in `last`. Without a directory no file is written.

    `stays_at`: where a reader finds the files of a job that failed, `HOST:DIRECTORY`; empty where a launcher of ours
    reads and removes them.
    """

    def __init__(self, rank: int, directory: str | None = None, *, stays: bool = False) -> None:
        self.rank, self.directory = rank, directory or os.environ.get(DIRECTORY_VARIABLE)
        self.stays_at = f"{platform.node()}:{self.directory}" if stays else ""
        self.last = "start-up"
        self._map = open_line(rank, self.directory) if self.directory else None

    def note(self, text: str) -> None:
        """Replace the words. A memory write: no system call, safe on the hot path."""
        self.last = text
        if self._map is not None:
            self._map[:WORDS_BYTES] = text.encode()[:WORDS_BYTES].ljust(WORDS_BYTES)

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Words for a stretch of work; they stay if it fails."""
        self.note(text)
        yield
        self.note(f"after {text}")


def open_line(rank: int, directory: str | Path) -> mmap.mmap:
    """The rank's file in memory, made if it is not there. ConfigError if there is no room for it."""
    path, size = line_path(directory, rank), WORDS_BYTES + PULSE_BYTES
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(file).st_size < size:  # written, not only made longer: a full disk would kill us later
                os.write(file, b" " * size)
            return mmap.mmap(file, size)
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigError(
            str(path),
            got=str(error),
            expected=f"room for {size} bytes, to keep what the rank is doing",
            fix=f"make room, or set ${DIRECTORY_VARIABLE} or $TMPDIR to another directory of this host",
        ) from error


def line_path(directory: str | Path, rank: int) -> Path:
    return Path(directory) / f"rank-{rank:05d}"


def read_lines(directory: str | Path) -> dict[int, Line]:
    """Rank -> its line, for every rank that has one."""
    return {line.rank: line for line in map(_read_line, sorted(Path(directory).glob("rank-*")))}


def _read_line(path: Path) -> Line:
    for _ in range(3):  # a beat may come between the first byte and the last
        data = path.read_bytes()
        try:
            written = _text(data[WORDS_BYTES:])
            pulse = _as_pulse(json.loads(written), data[:WORDS_BYTES]) if written else None
            break
        except ValueError:
            pulse = None
            time.sleep(0.01)
    rank = int(path.name.removeprefix("rank-"))
    return Line(rank=rank, words=_text(data[:WORDS_BYTES]) or "start-up", pulse=pulse)


def _as_pulse(values: dict[str, Any], words: bytes) -> Pulse:
    pulse = Pulse(**{**values, "peers": tuple(values["peers"])})
    if pulse.words_crc == zlib.crc32(words):
        return pulse
    return replace(pulse, still_s=0.0, waits_in="", peers=(), place="")  # the rank has moved on since the last beat


def _text(data: bytes) -> str:
    return data.decode(errors="replace").strip(" \0")
