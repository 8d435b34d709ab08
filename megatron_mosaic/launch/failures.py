"""Which rank failed first, in which lane and action: from exit codes, verdicts and lines."""

from __future__ import annotations

import signal
from collections.abc import Mapping

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.flight.line import read_lines
from megatron_mosaic.flight.suspects import GONE
from megatron_mosaic.flight.verdict import fix_of_suspect, read_verdicts


def first_cause(codes: Mapping[int, int], directory: str) -> int:
    """The rank whose failure made the others fail.

    The first verdict names it. Where there is none, or it only says that a peer went away: a rank killed by a signal,
    and then the lowest; a SIGTERM is the launcher's own, sent to whoever was left.
    """
    verdicts = read_verdicts(directory)
    if verdicts and (verdicts[0].suspect is not None or not verdicts[0].follows):
        return verdicts[0].cause
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    if killed:
        return min(killed)
    if verdicts:
        return verdicts[0].rank
    return min(codes, key=lambda rank: (codes[rank] == -signal.SIGTERM, rank))


def rank_failure(rank: int, got: str, directory: str, *, log: str = "", report: str = "") -> RankFailure:
    """The error that names a failed rank's lane and action. `report`: what all ranks did, if no verdict says it."""
    verdict = next((verdict for verdict in read_verdicts(directory) if verdict.cause == rank), None)
    lines = read_lines(directory)
    words = lines[rank].words if rank in lines else "before start-up"
    fix = "look for the first traceback above; ranks whose connection closed are followers"
    if verdict is not None:
        report = verdict.report
        if verdict.why:  # the rank moved on, or was ended by us: what it was at then counts
            words = verdict.words
            got = verdict.why if verdict.why != GONE else got
        if verdict.suspect is not None:
            fix = fix_of_suspect(rank)
    return RankFailure(
        f"rank {rank}, {words}",
        got="\n".join(part for part in (got, log, report) if part),
        expected="every rank to finish",
        fix=fix,
    )


def describe_exit(code: int) -> str:
    """`killed by SIGKILL`, or `exit code 3`."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
