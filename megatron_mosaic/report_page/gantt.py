"""Predicted over measured: for each class of alike ranks, when a rank of it ran what.

A row is one lane of one rank: whole ticks, three numbers a span (pause since the last one, length, label).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mosaic.plan import RankSet
from megatron_mosaic.schedules.timeline import Timeline

TICKS = 200_000  # of the longer of the two steps: more than a screen is wide when zoomed in a hundred times
MAX_SPANS = 40_000  # of each of the two timelines: about 10 bytes each on the page
MAX_CLASSES = 200  # that are drawn

Row = dict[str, Any]


def describe_gantt(
    predicted: Timeline, measured: Timeline | None, tracks: Mapping[str, int], alike: Sequence[RankSet]
) -> dict[str, Any]:
    """`classes`: name, number of ranks, predicted rows, and by measured rank its rows, the busiest rank first.

    `alike`: ranks of the same lanes, whose classes differ by when they wait and stand together: `group` is its number.
    `tracks`: module -> its track, if not 0. `left_out`: classes that are not drawn, because there are too many.
    """
    end_s = max(predicted.end_s, measured.end_s if measured else 0.0)
    writer = _Writer(end_s / TICKS, tracks)
    wanted = _choose(predicted)
    ran = _by_class(predicted, measured) if measured else {}
    rows, taken = _rows_by_rank(predicted), _rows_by_rank(measured) if measured else {}
    budget = MAX_SPANS
    classes = []
    for rank in sorted({*wanted, *ran}):
        found: dict[int, list[Row]] = {}
        for each in ran.get(rank, ()):
            budget -= sum(len(spans) for _, spans in taken[each])
            if found and budget < 0:
                break
            found[each] = [writer.row(lane, spans) for lane, spans in taken[each]]
        classes.append(
            {
                "name": predicted.name_ranks(rank),
                "ranks": predicted.num_ranks(rank),
                "group": next((number for number, ranks in enumerate(alike) if rank in ranks), len(alike)),
                "predicted": [writer.row(lane, spans) for lane, spans in rows.get(rank, ())] if rank in wanted else [],
                "measured": [{"rank": each, "rows": found[each]} for each in found],
            }
        )
    steps = {"predicted": predicted.end_s} | ({"measured": measured.end_s} if measured else {})
    bubbles = {"predicted": predicted.bubble_frac} | ({"measured": measured.bubble_frac} if measured else {})
    return {
        "end_s": end_s,
        "tick_s": end_s / TICKS,
        "steps": steps,
        "bubbles": bubbles,
        "labels": list(writer.labels),
        "classes": classes,
        "groups": [str(ranks) for ranks in alike] + ["others"],
        "left_out": len(rows) - len(wanted),
    }


class _Writer:
    """Writes rows of spans. `labels` counts the texts that were met, in this order."""

    def __init__(self, tick_s: float, tracks: Mapping[str, int]) -> None:
        self._tick_s, self._tracks = tick_s, tracks
        self.labels: dict[str, int] = {}

    def row(self, lane: str, spans: Sequence[tuple[float, float, str]]) -> Row:
        """One lane of one rank."""
        numbers, at = [], 0
        for start_s, end_s, label in spans:
            start, end = round(start_s / self._tick_s), round(end_s / self._tick_s)
            text = label.removeprefix(lane)
            numbers += [start - at, end - start, self.labels.setdefault(text, len(self.labels))]
            at = end
        module = lane.rpartition(".")[0]
        return {"lane": lane, "track": self._tracks.get(module, 0), "spans": numbers}


def _rows_by_rank(timeline: Timeline) -> dict[int, list[tuple[str, list[tuple[float, float, str]]]]]:
    rows: dict[int, list[tuple[str, list[tuple[float, float, str]]]]] = {}
    for (rank, lane), spans in timeline.by_row.items():
        rows.setdefault(rank, []).append((lane, [(span.start_s, span.end_s, span.label) for span in spans]))
    return rows


def _choose(timeline: Timeline) -> set[int]:
    """First ranks of the classes that are drawn: all; where they are too many, some spread over the machine."""
    count: dict[int, int] = {}
    for span in timeline.spans:
        count[span.rank] = count.get(span.rank, 0) + 1
    ranks = sorted(count)
    most = min(MAX_CLASSES, max(1, MAX_SPANS * len(ranks) // max(1, sum(count.values()))))
    if len(ranks) <= most:
        return set(ranks)
    return {ranks[round(i * (len(ranks) - 1) / max(1, most - 1))] for i in range(most)}


def _by_class(predicted: Timeline, measured: Timeline) -> dict[int, list[int]]:
    """First rank of each class -> its ranks that were measured, the busiest first; a rank of no class by itself."""
    busy_s = measured.busy_s_by_rank()
    found: dict[int, list[int]] = {}
    for rank in sorted(busy_s, key=lambda rank: (-busy_s[rank], rank)):
        found.setdefault(_class_of(rank, predicted.alike), []).append(rank)
    return found


def _class_of(rank: int, alike: Mapping[int, RankSet]) -> int:
    return next((first for first, ranks in alike.items() if rank in ranks), rank)
