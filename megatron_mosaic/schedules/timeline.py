"""When each action ran: predicted by the simulator or measured by the executor. One type, so they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import RankSet
from megatron_mosaic.schedules.actions import Action

IDLE = "~idle"  # what a rank waits, and what lies between its spans
_MOST_SPANS = 4  # of ranks, in the name of a row


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
    """Spans of one step. Constructor: spans of one (rank, lane) do not overlap.

    `alike`: a rank -> all that do the same at the same time, itself among them; only the spans of that one are here. A
    rank that is left out stands for itself.
    """

    spans: tuple[Span, ...]
    alike: Mapping[int, RankSet] = FrozenMap()

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
    def by_row(self) -> dict[tuple[int, str], tuple[Span, ...]]:
        """(rank, lane) -> its spans, in order; rows by rank, then by first start."""
        rows: dict[tuple[int, str], list[Span]] = {}
        for span in sorted(self.spans):
            rows.setdefault((span.rank, span.lane), []).append(span)
        found = sorted(rows.items(), key=lambda row: (row[0][0], row[1][0].start_s, row[0][1]))
        return {row: tuple(spans) for row, spans in found}

    @property
    def rows(self) -> tuple[tuple[int, str], ...]:
        """(rank, lane) of every row, ordered by rank, then by first start."""
        return tuple(self.by_row)

    def num_ranks(self, rank: int) -> int:
        """That this one stands for."""
        return len(self.alike[rank]) if rank in self.alike else 1

    def name_ranks(self, rank: int) -> str:
        """The ranks that this one stands for, e.g. `rank 3`, `ranks 0-7`; of many spans, the first."""
        ranks = self.alike.get(rank)
        if ranks is None or len(ranks) == 1:
            return f"rank {rank}"
        if len(ranks.spans) > _MOST_SPANS:
            return f"ranks {RankSet(ranks.spans[:_MOST_SPANS])},... ({len(ranks)})"
        return f"ranks {ranks}"

    def bubbles(self) -> dict[int, list[tuple[float, float]]]:
        """Rank -> when it runs nothing, from 0 to the end of the step."""
        found: dict[int, list[tuple[float, float]]] = {rank: [] for rank in sorted({s.rank for s in self.spans})}
        until: dict[int, float] = {}
        end_s = self.end_s
        for span in sorted(self.spans, key=lambda span: span.start_s):
            idle_s = until.get(span.rank, 0.0)
            if span.start_s > idle_s:
                found[span.rank].append((idle_s, span.start_s))
            until[span.rank] = max(idle_s, span.end_s)
        for rank, idle in found.items():
            if until[rank] < end_s:
                idle.append((until[rank], end_s))
        return found

    def busy_s_by_rank(self) -> dict[int, float]:
        """Rank -> seconds in which it runs at least one span."""
        end_s = self.end_s
        return {rank: end_s - sum(b - a for a, b in idle) for rank, idle in self.bubbles().items()}

    @property
    def bubble_frac(self) -> float:
        """Share of rank-seconds in which a rank has nothing to run. Ranks without any span do not count."""
        busy, end_s = self.busy_s_by_rank(), self.end_s
        all_busy_s = sum(self.num_ranks(rank) * seconds for rank, seconds in busy.items())
        return 1 - all_busy_s / (sum(map(self.num_ranks, busy)) * end_s) if end_s else 0.0

    def seconds_by_lane(self) -> dict[str, float]:
        """Lane -> seconds of its spans, mean over the ranks that run it."""
        return self._mean_seconds(lambda span: span.lane)

    def seconds_by_module(self) -> dict[str, float]:
        """Module -> seconds of its spans, mean over the ranks that run it."""
        return self._mean_seconds(lambda span: span.lane.partition(".")[0])

    def seconds_by_kind(self) -> dict[str, float]:
        """Kind of action (F, B, ...), `~data` and the like, and `~idle`: what a rank does on average, from the step's
        start to its end. Kinds add up to the step where no two spans of a rank run at once."""
        busy, found = self.busy_s_by_rank(), dict[str, float]()
        num_ranks = sum(map(self.num_ranks, busy))
        for span in self.spans:
            kind = span.label if span.label.startswith("~") else Action.parse(span.label).kind.value
            seconds = self.num_ranks(span.rank) * (span.end_s - span.start_s)
            found[kind] = found.get(kind, 0.0) + seconds / num_ranks
        idle_s = sum(self.num_ranks(rank) * (self.end_s - seconds) for rank, seconds in busy.items())
        return found | {IDLE: idle_s / num_ranks} if busy else found

    def _mean_seconds(self, key: Callable[[Span], str]) -> dict[str, float]:
        total: dict[str, float] = {}
        ranks: dict[str, set[int]] = {}
        for span in self.spans:
            name = key(span)
            total[name] = total.get(name, 0.0) + self.num_ranks(span.rank) * (span.end_s - span.start_s)
            ranks.setdefault(name, set()).add(span.rank)
        return {name: seconds / sum(map(self.num_ranks, ranks[name])) for name, seconds in total.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class KindDifference:
    """Seconds that a rank on average spends on a kind of action in a step, predicted and measured."""

    kind: str
    predicted_s: float
    measured_s: float

    @property
    def residual_s(self) -> float:
        """What the prediction lacks; below zero: what it has too much."""
        return self.measured_s - self.predicted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneDifference:
    """Seconds of one lane (mean over ranks), predicted and measured."""

    lane: str
    predicted_s: float
    measured_s: float


def diff(predicted: Timeline, measured: Timeline) -> tuple[LaneDifference, ...]:
    """Lane by lane, how many seconds its spans were predicted to take and took."""

    ours, theirs = predicted.seconds_by_lane(), measured.seconds_by_lane()
    return tuple(
        LaneDifference(lane=lane, predicted_s=ours.get(lane, 0.0), measured_s=theirs.get(lane, 0.0))
        for lane in sorted({*ours, *theirs})
    )


def diff_kinds(predicted: Timeline, measured: Timeline) -> tuple[KindDifference, ...]:
    """Kind by kind; residuals add up to that of the step, where ranks are those of the measured step."""
    ours, theirs = predicted.seconds_by_kind(), measured.seconds_by_kind()
    return tuple(
        KindDifference(kind=kind, predicted_s=ours.get(kind, 0.0), measured_s=theirs.get(kind, 0.0))
        for kind in sorted({*ours, *theirs})
    )
