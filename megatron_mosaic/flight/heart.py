"""A rank's heart: a thread that beats once a second in the rank's line, and says where the main thread stands (or,
while lanes of the rank run in threads of their own, one of these).

A stopped process has no beats; a hung one has, and its standing tells whether it waits for others or they for it.
"""

from __future__ import annotations

import math
import os
import platform
import threading
import time
import zlib
from collections.abc import Collection
from pathlib import Path

from megatron_mosaic.flight.line import PULSE_BYTES, WORDS_BYTES, Pulse, open_line
from megatron_mosaic.flight.standing import Standing, find_standing

BEAT_S = 1.0


class Heart:
    """The heart of one rank of this process; it has beaten once when the constructor returns.

    `_threads`: where it looks; those that stand in the `_waiting_room`, a file, wait for another of the process.
    `timeout_s`: how long this rank waits for others; `_seen` and since when, `_moved_ns`: what the last beat found.
    """

    def __init__(self, rank: int, directory: str | Path) -> None:
        self._rank, self._map = rank, open_line(rank, directory)
        self._threads: tuple[int, ...] = (threading.main_thread().ident or 0,)
        self._waiting_room = ""
        self._born_ns = self._moved_ns = time.monotonic_ns()
        self._seen: tuple[bytes, Standing] | None = None
        self.timeout_s = math.inf
        self._beat()
        threading.Thread(target=self._run, name="mosaic-heart", daemon=True).start()

    def expect(self, timeout_s: float) -> None:
        """From now on, the rank waits for others as long as this; and a longer silence of its own is a failure."""
        self.timeout_s = timeout_s

    def watch(self, threads: Collection[int], waiting_room: str) -> None:
        """Look at these threads, too. Functions of the file `waiting_room` wait for other threads of the process."""
        self._waiting_room = waiting_room
        self._threads = (self._threads[0], *threads)

    def _standing(self) -> Standing:
        """Of a thread that works, if there is one; else of one that waits for another rank."""
        found = [find_standing(thread, self._rank) for thread in self._threads]
        room = f"({Path(self._waiting_room).name}:"
        outside = [each for each in found if each.place and (not self._waiting_room or room not in each.place)]
        return next((each for each in outside if not each.waits_in), (outside or found)[0])

    def _run(self) -> None:
        while True:
            time.sleep(BEAT_S)
            self._beat()

    def _beat(self) -> None:
        now = time.monotonic_ns()
        try:
            standing = self._standing()
        except Exception as error:  # whatever it met in foreign frames: a heart that stops is taken for a dead rank
            standing = Standing(waits_in="", peers=(), place=f"an unknown place ({type(error).__name__})")
        seen = (self._map[:WORDS_BYTES], standing)
        if seen != self._seen:
            self._seen, self._moved_ns = seen, now
        pulse = Pulse(
            host=platform.node(),
            pid=os.getpid(),
            born_ns=self._born_ns,
            beat_ns=now,
            words_crc=zlib.crc32(seen[0]),
            still_s=(now - self._moved_ns) / 1e9,
            waits_in=standing.waits_in,
            peers=standing.peers,
            place=standing.place,
            timeout_s=self.timeout_s,
        )
        self._map[WORDS_BYTES:] = pulse.as_bytes()[:PULSE_BYTES].ljust(PULSE_BYTES)
