"""No rank outlives who started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process the signal when its parent dies, or now if it is no longer the child of `parent`.

    The parent is, to the letter, the thread that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number))
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal_number)
