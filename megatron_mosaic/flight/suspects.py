"""Who keeps the others waiting: from all ranks' lines, as pure data.

    gone     its process has ended
    silent   its heart has stopped: a stopped process, or one stuck in foreign code
    missing  it never wrote a line
    awake    it beats and does not wait for anybody, while another waits: slow, or hung

In this order: a rank that is gone makes others wait, and who waits is no suspect.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.flight.line import WAIT, Line, read_lines

FINISHED = "finished"  # the words of a rank that has done its work
GONE = "its process is gone, without a word of its own: killed from outside"
SILENT_S = 5.0  # without a beat; a busy machine may be a second or two late
_SLACK_NS = 2_000_000_000  # ranks of one job may be born one after the other
MAX_LINES = 64  # of a report


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A rank as it was found: its line, whether its process exists, and how long its heart was silent."""

    line: Line
    exists: bool
    silent_s: float

    @property
    def sentence(self) -> str:
        """What it does, after its words: `waits for rank 2 at take (incoming.py:84), for 7 s`."""
        pulse = self.line.pulse
        if pulse is None:
            return self.line.words
        if not self.exists:
            return f"{self.line.words}; its process is gone"
        if self.silent_s >= SILENT_S:
            return f"{self.line.words}; no sign of life for {self.silent_s:.0f} s{_how(pulse.pid)}"
        for_s = f" for {pulse.still_s:.0f} s" if pulse.still_s >= 1 else ""
        where = f" at {pulse.place}" if pulse.place else ""
        if pulse.waits_in:
            peers = f" for {_ranks(pulse.peers)}" if pulse.peers else ""
            call = "" if pulse.waits_in == WAIT else f" in {pulse.waits_in}"
            return f"{self.line.words}; waits{call}{peers}{where}{for_s and f',{for_s}'}"
        return f"{self.line.words}; runs{where}{for_s and f',{for_s}'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """The rank that the others wait for, and why it is thought so."""

    rank: int
    why: str


def read_states(directory: str | Path, asking: int | None = None) -> dict[int, State]:
    """Every rank of this host as it is now; for a rank that asks, without what an earlier job left behind."""
    now, lines, born_ns = time.monotonic_ns(), read_lines(directory), 0
    if asking in lines and (own := lines[asking].pulse) is not None:
        born_ns = own.born_ns - _SLACK_NS
    states = {}
    for rank, line in lines.items():
        pulse = line.pulse
        if pulse is None:
            states[rank] = State(line=line, exists=True, silent_s=0.0)
        elif pulse.host == platform.node() and pulse.beat_ns >= born_ns:
            states[rank] = State(line=line, exists=process_exists(pulse.pid), silent_s=(now - pulse.beat_ns) / 1e9)
    return states


def find_suspect(states: Mapping[int, State], expected: Collection[int] = (), besides: int = -1) -> Suspect | None:
    """The rank that keeps the others waiting; None if all that are left wait for each other.

    `expected`: ranks that should have a line; `besides`: the rank that asks.
    """
    others = {rank: state for rank, state in states.items() if rank != besides and state.line.pulse is not None}
    gone = find_gone(states, besides)
    if gone:
        return gone
    silent = {rank: s.silent_s for rank, s in others.items() if s.silent_s >= SILENT_S}
    if silent:
        return suspect_silence(others[max(silent, key=silent.__getitem__)].line, max(silent.values()))
    missing = sorted(set(expected) - {besides} - states.keys())
    if missing:
        return Suspect(rank=missing[0], why="it has not come as far as the others: no line of its own")
    return _longest_awake(others)


def suspect_silence(line: Line, silent_s: float) -> Suspect:
    """Suspicion of a rank whose heart has been silent for so long."""
    how = _how(line.pulse.pid) if line.pulse else ""
    why = f"no sign of life for {silent_s:.0f} s{how or ': stopped, or stuck in foreign code'}"
    return Suspect(rank=line.rank, why=why)


def find_gone(states: Mapping[int, State], besides: int = -1) -> Suspect | None:
    """A rank whose process has ended before its work was done."""
    for rank, state in states.items():
        if rank != besides and not state.exists and state.line.words != FINISHED:
            return Suspect(rank=rank, why=GONE)
    return None


def _longest_awake(others: Mapping[int, State]) -> Suspect | None:
    """Of those that do not wait: one that others wait for by name, else the one that has stood still longest."""
    pulses = {rank: state.line.pulse for rank, state in others.items() if state.line.pulse is not None}
    awake = {rank: pulse for rank, pulse in pulses.items() if not pulse.waits_in}
    if not awake:
        return None
    wanted = {peer for pulse in pulses.values() for peer in pulse.peers if len(pulse.peers) == 1}
    rank = max(awake, key=lambda r: (r in wanted, awake[r].still_s))
    where = f" at {awake[rank].place}" if awake[rank].place else ""
    return Suspect(rank=rank, why=f"it does not wait, it runs{where}, for {awake[rank].still_s:.0f} s: slow, or hung")


def render_states(states: Mapping[int, State]) -> str:
    """One line per rank."""
    lines = [f"  rank {rank}: {state.sentence}" for rank, state in sorted(states.items())]
    left = len(lines) - MAX_LINES
    return "\n".join(lines[:MAX_LINES] + ([f"  and {left} more"] if left > 0 else []))


def process_exists(pid: int) -> bool:
    """Whether a process of this host runs, or is stopped; not one that has ended and waits for its parent."""
    if sys.platform == "linux":
        return _kernel_state(pid) not in ("", "Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _kernel_state(pid: int) -> str:
    """R, S, D, T, Z ...; "" if there is no such process, or no /proc."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def is_stopped(pid: int) -> bool:
    """Whether the process was told to stop (SIGSTOP, a debugger); never true without /proc."""
    return _kernel_state(pid) in ("T", "t")


def _how(pid: int) -> str:
    return " (its process is stopped)" if is_stopped(pid) else ""


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
