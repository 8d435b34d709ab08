"""Last words of a rank that is told to end because another died: whose death it was.

torchrun and srun end all ranks at once when one is killed, and their own report knows neither lane nor action. The main
thread may be waiting inside a library, deaf to Python's handlers; but the interpreter tells a thread of ours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.suspects import find_gone, read_states, render_states
from megatron_mosaic.flight.verdict import fix_of_suspect, name_files

TERMINATED = 128 + signal.SIGTERM
_PATIENCE_S = 1.0


def told_path(directory: str | Path) -> Path:
    """The file that says that a rank has said it."""
    return Path(directory) / "told"


class Farewell:
    """Takes SIGTERM from its default, for good. Whoever sets a handler of his own later has it alone."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        signal.signal(signal.SIGTERM, self._ours)
        signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_child)
        threading.Thread(target=self._wait, args=(told,), name="mosaic-farewell", daemon=True).start()

    def _ours(self, *_: object) -> None:
        """The main thread does no more: the other ends the process."""
        time.sleep(2 * _PATIENCE_S)

    def _leave_child(self) -> None:
        """A forked process shares our pipe: its signals are not ours."""
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == self._ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _wait(self, told: int) -> None:
        while True:
            if os.read(told, 1) == bytes([signal.SIGTERM]) and signal.getsignal(signal.SIGTERM) == self._ours:
                self._say()
                os._exit(TERMINATED)

    def _say(self) -> None:
        assert self._flight.directory is not None
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            states = read_states(self._flight.directory, self._flight.rank)
            gone = find_gone(states, self._flight.rank)
            if gone is not None:
                with contextlib.suppress(FileExistsError):  # one rank of a host says it
                    told_path(self._flight.directory).touch(exist_ok=False)
                    failure = RankFailure(
                        f"rank {gone.rank}, {states[gone.rank].line.words}",
                        got="\n".join(filter(None, (gone.why, render_states(states), name_files(self._flight)))),
                        expected="every rank to finish",
                        fix=fix_of_suspect(gone.rank),
                    )
                    os.write(2, f"{failure}\n".encode())  # the main thread may have taken sys.stderr for itself
                return
            time.sleep(0.05)
