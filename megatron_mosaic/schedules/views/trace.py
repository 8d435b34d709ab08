"""Timelines as a trace for Perfetto or chrome://tracing.

A process for each title and the ranks that are alike, a thread for each lane and one for bubbles; an arrow from an
action to each that needs its result on another lane; a counter of the bytes that each lane holds.
Format: "Trace Event Format", Google, 2016 (flow events `s` and `f`, counter events `C`; microseconds).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.schedules.actions import Action
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.timeline import Span, Timeline

Event = dict[str, Any]
Samples = Sequence[tuple[float, Mapping[str, float]]]  # seconds, and from then on the bytes that each holder has

_BUBBLE = "bubble"
_WITHIN = 1e-3  # of a span, before its end: an arrow belongs to the span that its start lies in


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """A timeline under its title. `memory`: rank -> what it holds; empty where nobody knows."""

    title: str
    timeline: Timeline
    memory: Mapping[int, Samples] = FrozenMap()


def to_chrome_trace(steps: Iterable[TracedStep], schedule: Schedule | None = None) -> str:
    """JSON. Arrows are those of the schedule's needs; without a schedule there are none."""
    events: list[Event] = []
    threads: dict[tuple[int, str], tuple[int, int]] = {}
    num_processes = 0
    for step in steps:
        rows: dict[int, list[str]] = {}
        for rank, lane in step.timeline.rows:
            rows.setdefault(rank, []).append(lane)
        for pid, (rank, lanes) in enumerate(rows.items(), num_processes + 1):
            events += _name_process(pid, f"{step.title} {step.timeline.name_ranks(rank)}", [*lanes, _BUBBLE])
            threads |= {(rank, lane): (pid, tid) for tid, lane in enumerate([*lanes, _BUBBLE])}
            events += _count_memory(pid, step.memory.get(rank, ()))
        events += _list_slices(step.timeline, threads)
        if schedule is not None:
            events += _list_arrows(step.timeline, schedule, threads, len(events))
        num_processes += len(rows)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _name_process(pid: int, name: str, threads: Sequence[str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    for tid, thread in enumerate(threads):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}}


def _count_memory(pid: int, samples: Samples) -> Iterator[Event]:
    for at_s, held in samples:
        yield {"ph": "C", "name": "memory (bytes)", "pid": pid, "ts": at_s * 1e6, "args": dict(held)}


def _list_slices(timeline: Timeline, threads: Mapping[tuple[int, str], tuple[int, int]]) -> Iterator[Event]:
    bubbles = [Span(r, _BUBBLE, *each, _BUBBLE) for r, found in timeline.bubbles().items() for each in found]
    for span in sorted((*timeline.spans, *bubbles)):
        pid, tid = threads[span.rank, span.lane]
        times = {"ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6}
        yield {"ph": "X", "name": span.label, "cat": span.lane, "pid": pid, "tid": tid, **times}


def _list_arrows(
    timeline: Timeline, schedule: Schedule, threads: Mapping[tuple[int, str], tuple[int, int]], number: int
) -> Iterator[Event]:
    """From the same rank where the result was made there too, else from the last rank that had it in time."""
    made: dict[str, list[Span]] = {}
    for span in sorted(timeline.spans, key=lambda span: span.end_s):
        made.setdefault(span.label, []).append(span)
    for target in sorted(timeline.spans):
        if target.label.startswith("~"):
            continue
        action = Action.parse(target.label)
        for need in schedule.needs(action):
            found = made.get(str(need), []) if need.lane != action.lane else []
            here = [span for span in found if span.rank == target.rank]
            if not (sources := here or [span for span in found if span.end_s <= target.start_s] or found):
                continue
            source, number = sources[-1], number + 1
            for kind, span, at_s in (
                ("s", source, source.end_s - _WITHIN * (source.end_s - source.start_s)),
                ("f", target, target.start_s),
            ):
                pid, tid = threads[span.rank, span.lane]
                arrow = {"ph": kind, "id": number, "name": "need", "cat": "need", "pid": pid, "tid": tid}
                yield {**arrow, "ts": at_s * 1e6, **({"bp": "e"} if kind == "f" else {})}
