"""Which rank failed first, in which lane and action: from exit codes and flight files."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Mapping

from megatron_mosaic.colocation.flight import failed_at_ns, read_flights
from megatron_mosaic.errors import RankFailure

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank_failure(rank: int, got: str, directory: str, log: str = "", *, all_ranks: bool = False) -> RankFailure:
    """The error that names a failed rank's lane and action; with `all_ranks`, everybody's."""
    flights = read_flights(directory)
    if all_ranks:
        log = "\n".join(f"  rank {r}: {line}" for r, line in sorted(flights.items()))
    return RankFailure(
        f"rank {rank}, {flights.get(rank, 'before start-up')}",
        got=got + (f"\n{log}" if log else ""),
        expected="every rank to finish",
        fix="look for the first traceback above; ranks whose connection closed are followers",
    )


def first_cause(codes: Mapping[int, int], directory: str) -> int:
    """The rank whose failure made the others fail.

    A rank killed by a signal comes first, then the rank that raised first; those lost their peer, and a SIGTERM is the
    launcher's own, sent to whoever was left.
    """

    def key(rank: int) -> tuple[int, float]:
        code = codes[rank]
        kind = 2 if code == -signal.SIGTERM else int(code > 0)
        return kind, failed_at_ns(directory, rank)

    return min(codes, key=key)


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process the signal when its parent dies, so that no rank outlives its launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number))
