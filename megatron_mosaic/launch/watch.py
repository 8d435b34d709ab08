"""The launcher's eye on its ranks' hearts: for what no other rank would notice."""

from __future__ import annotations

import time

from megatron_mosaic.flight.line import read_lines
from megatron_mosaic.flight.suspects import SILENT_S, Suspect, process_exists, suspect_silence

_LOOK_S = 0.5


class Watch:
    """Silence of each rank of a job, as far as this process was awake to hear it: a pause of the whole job is none.

    `_looked`: when it did last.
    """

    def __init__(self, directory: str) -> None:
        self._directory, self._looked = directory, time.monotonic()
        self._silent_s: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, for how long it is the last)

    def find_silent(self) -> Suspect | None:
        """A rank that has been silent for longer than ranks wait for each other. It looks at most twice a second."""
        passed = time.monotonic() - self._looked
        if passed < _LOOK_S:
            return None
        self._looked += passed
        for rank, line in read_lines(self._directory).items():
            if line.pulse is None or not process_exists(line.pulse.pid):
                continue
            beat_ns, silent_s = self._silent_s.get(rank, (0, 0.0))
            silent_s = silent_s + min(passed, 2 * _LOOK_S) if beat_ns == line.pulse.beat_ns else 0.0
            self._silent_s[rank] = (line.pulse.beat_ns, silent_s)
            if silent_s > line.pulse.timeout_s + SILENT_S:
                return suspect_silence(line, silent_s)
        return None
