"""When each action ran: predicted by the simulator or measured by the executor. One type, so they can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.units import MS


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """One action on one rank, in seconds from the start of the step. `label` is the action's text, e.g. `llm.0F3`.

    Spans whose label starts with `~` are not actions of the schedule (`~grads`, `~optimizer`): the step's tail.
    """

    rank: int
    lane: str
    start_s: float
    end_s: float
    label: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of one step. Constructor: spans of one (rank, lane) do not overlap."""

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        last: dict[tuple[int, str], Span] = {}
        for span in sorted(self.spans):
            before = last.get((span.rank, span.lane))
            if span.end_s < span.start_s or (before is not None and span.start_s < before.end_s - 1e-9):
                raise ScheduleError(
                    f"timeline: rank {span.rank} lane {span.lane}",
                    got=f"{span.label} at {span.start_s:.6f}-{span.end_s:.6f} s"
                    + (f" after {before.label} until {before.end_s:.6f} s" if before else ""),
                    expected="spans that do not overlap",
                    fix="report this: the recorder or the simulator is wrong",
                )
            last[span.rank, span.lane] = span

    @property
    def end_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def rows(self) -> tuple[tuple[int, str], ...]:
        """(rank, lane) of every row, ordered by rank, then by first start."""
        first: dict[tuple[int, str], float] = {}
        for span in self.spans:
            key = (span.rank, span.lane)
            first[key] = min(first.get(key, span.start_s), span.start_s)
        return tuple(sorted(first, key=lambda key: (key[0], first[key], key[1])))

    def busy_s(self, rank: int) -> float:
        """Seconds in which the rank runs at least one span."""
        busy, until = 0.0, 0.0
        for start, end in sorted((s.start_s, s.end_s) for s in self.spans if s.rank == rank):
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        return busy

    @property
    def bubble_frac(self) -> float:
        """Share of rank-seconds in which a rank has nothing to run. Ranks without any span do not count."""
        ranks = {span.rank for span in self.spans}
        return 1 - sum(map(self.busy_s, ranks)) / (len(ranks) * self.end_s) if self.end_s else 0.0

    def seconds_by_module(self) -> dict[str, float]:
        """Module -> seconds of its spans, mean over the ranks that run it."""
        total: dict[str, float] = {}
        ranks: dict[str, set[int]] = {}
        for span in self.spans:
            module = span.lane.partition(".")[0]
            total[module] = total.get(module, 0.0) + span.end_s - span.start_s
            ranks.setdefault(module, set()).add(span.rank)
        return {module: total[module] / len(ranks[module]) for module in total}


def render_text(timeline: Timeline, *, width: int = 100, end_s: float | None = None) -> str:
    """One row per rank and lane; time runs right, `.` idle, `=` still running.

    `end_s` sets the scale, so that two timelines can be laid under each other.
    """
    scale_s = end_s or timeline.end_s
    if not timeline.spans or scale_s <= 0:
        return "(empty timeline)"
    cell_s = scale_s / width
    names = {row: f"rank {row[0]} {row[1]}" for row in timeline.rows}
    margin = max(map(len, names.values()))
    ticks = "".join(f"{tick * cell_s / MS:<10.4g}" for tick in range(0, width, 10))[:width]
    lines = [f"{'t (ms)':<{margin}} |{ticks}|"]
    for row, name in names.items():
        cells = ["."] * width
        busy_s = 0.0
        for span in sorted(s for s in timeline.spans if (s.rank, s.lane) == row):
            busy_s += span.end_s - span.start_s
            first = min(width - 1, round(span.start_s / cell_s))
            last = max(first + 1, min(width, round(span.end_s / cell_s)))
            text = span.label.removeprefix(span.lane)
            cells[first:last] = list(text[: last - first].ljust(last - first, "="))
        lines.append(f"{name:<{margin}} |{''.join(cells[:width])}| busy {busy_s / scale_s:4.0%}")
    return "\n".join(lines)


def to_chrome_trace(timelines: Iterable[tuple[str, Timeline]]) -> str:
    """JSON for Perfetto or chrome://tracing: one process per (title, rank), one thread per lane, microseconds."""
    events: list[dict[str, Any]] = []
    pid = 0
    for title, timeline in timelines:
        for rank in sorted({span.rank for span in timeline.spans}):
            pid += 1
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{title} rank {rank}"}})
            lanes = [lane for r, lane in timeline.rows if r == rank]
            for tid, lane in enumerate(lanes):
                events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
                events += [
                    {
                        "ph": "X",
                        "name": span.label,
                        "cat": lane,
                        "pid": pid,
                        "tid": tid,
                        "ts": span.start_s * 1e6,
                        "dur": (span.end_s - span.start_s) * 1e6,
                    }
                    for span in sorted(timeline.spans)
                    if (span.rank, span.lane) == (rank, lane)
                ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneDifference:
    """Seconds of one lane (mean over ranks), predicted and measured."""

    lane: str
    predicted_s: float
    measured_s: float


def diff(predicted: Timeline, measured: Timeline) -> tuple[LaneDifference, ...]:
    """Lane by lane, how many seconds its spans were predicted to take and took."""

    def seconds(timeline: Timeline) -> dict[str, float]:
        total: dict[str, float] = {}
        ranks: dict[str, set[int]] = {}
        for span in timeline.spans:
            total[span.lane] = total.get(span.lane, 0.0) + span.end_s - span.start_s
            ranks.setdefault(span.lane, set()).add(span.rank)
        return {lane: total[lane] / len(ranks[lane]) for lane in total}

    ours, theirs = seconds(predicted), seconds(measured)
    return tuple(
        LaneDifference(lane=lane, predicted_s=ours.get(lane, 0.0), measured_s=theirs.get(lane, 0.0))
        for lane in sorted({*ours, *theirs})
    )
