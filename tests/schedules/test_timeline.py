"""Timelines: what the constructor refuses, the numbers derived from spans, and the two ways they are shown."""

import json

import pytest

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import RankSet
from megatron_mosaic.schedules.timeline import Span, Timeline, diff, diff_kinds
from megatron_mosaic.schedules.views.text import render_text
from megatron_mosaic.schedules.views.trace import TracedStep, to_chrome_trace
from tests.goldens import assert_golden

SPANS = (
    Span(0, "vision.0", 0.0, 0.1, "vision.0F0"),
    Span(0, "llm.0", 0.1, 0.3, "llm.0F0"),
    Span(0, "llm.0", 0.3, 0.7, "llm.0B0"),
    Span(1, "llm.1", 0.3, 0.5, "llm.1F0"),
    Span(1, "llm.1", 0.5, 0.9, "llm.1B0"),
    Span(0, "~grads", 0.9, 1.0, "~grads"),
)
TIMELINE = Timeline(SPANS)


@pytest.mark.parametrize(
    "spans",
    [
        (Span(0, "llm.0", 0.2, 0.1, "llm.0F0"),),
        (Span(0, "llm.0", 0.0, 0.2, "llm.0F0"), Span(0, "llm.0", 0.1, 0.3, "llm.0F1")),
    ],
)
def test_refuses_overlap_and_time_travel(spans):
    with pytest.raises(ScheduleError, match=r"rank 0 lane llm\.0"):
        Timeline(spans)


def test_other_lanes_and_touching_spans_may_meet():
    Timeline((Span(0, "a.0", 0, 1, "a.0F0"), Span(0, "b.0", 0, 1, "b.0F0"), Span(0, "a.0", 1, 2, "a.0F1")))


def test_numbers():
    assert TIMELINE.end_s == 1.0
    assert TIMELINE.rows == ((0, "vision.0"), (0, "llm.0"), (0, "~grads"), (1, "llm.1"))
    assert TIMELINE.busy_s_by_rank()[0] == pytest.approx(0.8)
    assert TIMELINE.busy_s_by_rank()[1] == pytest.approx(0.6)
    assert TIMELINE.bubble_frac == pytest.approx(0.3)  # (0.2 + 0.4) of 2 rank-seconds
    assert TIMELINE.seconds_by_module() == pytest.approx({"vision": 0.1, "llm": 0.6, "~grads": 0.1})


def test_busy_counts_concurrent_lanes_once():
    timeline = Timeline((Span(0, "a.0", 0, 2, "a.0F0"), Span(0, "b.0", 1, 3, "b.0F0"), Span(0, "b.0", 5, 6, "b.0B0")))
    assert timeline.busy_s_by_rank()[0] == 4


def test_empty():
    empty = Timeline(())
    assert (empty.end_s, empty.bubble_frac, empty.rows, empty.seconds_by_module()) == (0.0, 0.0, (), {})
    assert render_text(empty) == "(empty timeline)"


def test_render_golden():
    other = render_text(TIMELINE, width=40, end_s=2.0)
    assert_golden("timeline", render_text(TIMELINE, width=40) + "\n\n" + other + "\n")


def test_ranks_that_are_alike_count_as_often_as_they_are():
    folded = Timeline(SPANS, FrozenMap({0: RankSet.parse("0,2-3")}))
    assert folded.bubble_frac == pytest.approx((3 * 0.2 + 0.4) / 4)
    assert folded.seconds_by_lane() == pytest.approx(TIMELINE.seconds_by_lane())
    both = Timeline((*SPANS, Span(4, "llm.0", 0.0, 0.2, "llm.0F0")), folded.alike)
    assert both.seconds_by_lane()["llm.0"] == pytest.approx((3 * 0.6 + 0.2) / 4)
    assert [folded.name_ranks(rank) for rank in (0, 1)] == ["ranks 0,2-3", "rank 1"]
    many = Timeline(SPANS, FrozenMap({0: RankSet.of(range(0, 40, 2))}))
    assert many.name_ranks(0) == "ranks 0,2,4,6,... (20)"


def test_bubbles_are_where_a_rank_runs_nothing():
    assert TIMELINE.bubbles()[0] == [(0.7, 0.9)]
    assert TIMELINE.bubbles()[1] == [(0.0, 0.3), (0.9, 1.0)]
    rows = dict(line.split(" |", 1) for line in render_text(TIMELINE, width=40).splitlines()[1:])
    assert rows["rank 1 llm.1   "].startswith("............F0")  # nothing runs there
    assert rows["rank 0 llm.0   "].startswith("    F0")  # vision.0 does


def _trace(**more) -> list[dict]:
    return json.loads(to_chrome_trace([TracedStep(title="predicted", timeline=TIMELINE, **more)]))["traceEvents"]


def test_chrome_trace():
    steps = [TracedStep(title=title, timeline=TIMELINE) for title in ("predicted", "measured")]
    events = json.loads(to_chrome_trace(steps))["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert sum(e["name"] == "bubble" for e in slices) == 2 * 3
    assert len(slices) == 2 * len(SPANS) + 2 * 3
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {f"{t} rank {r}" for t in ("predicted", "measured") for r in (0, 1)}
    first = next(e for e in slices if e["name"] == "llm.0B0")
    assert (first["ts"], first["dur"]) == pytest.approx((0.3e6, 0.4e6))
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert all(threads[e["pid"], e["tid"]] == e["cat"] for e in slices)
    assert {e["ph"] for e in events} == {"M", "X"}


def test_counters_are_those_of_the_samples():
    events = _trace(memory={1: [(0.0, {"llm.1": 5.0}), (0.5, {"llm.1": 7.0})]})
    counters = [(e["pid"], e["ts"], e["args"]) for e in events if e["ph"] == "C"]
    assert counters == [(2, 0.0, {"llm.1": 5.0}), (2, 0.5e6, {"llm.1": 7.0})]


def test_diff():
    slower = Timeline(tuple(Span(s.rank, s.lane, 2 * s.start_s, 2 * s.end_s, s.label) for s in SPANS[:5]))
    rows = {row.lane: (row.predicted_s, row.measured_s) for row in diff(TIMELINE, slower)}
    assert rows["llm.0"] == pytest.approx((0.6, 1.2))
    assert rows["~grads"] == pytest.approx((0.1, 0.0))


def test_kinds_add_up_to_the_step():
    """Two ranks, one of which stands for three: by hand, (1 + 3 x 2) / 4 and so on."""
    spans = [Span(0, "llm.0", 0.0, 1.0, "llm.0F0"), Span(0, "llm.0", 3.0, 4.0, "llm.0B0")]
    spans += [Span(1, "llm.1", 1.0, 3.0, "llm.1v1F0"), Span(1, "~grads", 3.0, 3.5, "~grads")]
    timeline = Timeline(tuple(spans), {1: RankSet.parse("1-3")})
    kinds = timeline.seconds_by_kind()
    assert kinds == pytest.approx({"F": 7 / 4, "B": 1 / 4, "~grads": 1.5 / 4, "~idle": (2 + 3 * 1.5) / 4})
    assert sum(kinds.values()) == pytest.approx(timeline.end_s)
    longer = Timeline((*spans[:3], Span(1, "~grads", 3.0, 6.0, "~grads")), {1: RankSet.parse("1-3")})
    residuals = {each.kind: each.residual_s for each in diff_kinds(timeline, longer)}
    assert sum(residuals.values()) == pytest.approx(2.0)
    assert residuals["~grads"] == pytest.approx(3 * 2.5 / 4)
    assert residuals["F"] == 0
