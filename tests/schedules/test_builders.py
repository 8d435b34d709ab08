"""Builders that nest modules around the backbone: legal on any graph, few live units, and the closed form of W."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, Quota, ScheduleChoice
from megatron_mosaic.schedules import SCHEDULES, Action, Kind, build, build_schedule
from megatron_mosaic.schedules.lane_work import LaneWork
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph
from megatron_mosaic.schedules.text import format_schedule, parse_schedule
from tests.cases import WORKLOAD, make_plan
from tests.goldens import assert_golden
from tests.schedules.graphs import graphs

NESTING = ("three_phase", "nested", "overlap", "bubble_fill")


@pytest.mark.parametrize("name", NESTING)
@given(graph=graphs())
def test_every_graph_has_one(name, graph):
    schedule = SCHEDULES[name].build(graph)  # the constructor refuses an order against a need
    assert parse_schedule(format_schedule(schedule)) == schedule
    assert {m: schedule.work.has_backward(m) for m in graph.units} == {m: m in graph.has_backward for m in graph.units}


@settings(max_examples=20)
@given(graphs())
def test_nested_holds_few_units_whatever_the_batch(graph):
    """Of every module behind the backbone one unit at a time; of encoders no more at four times the batch."""
    work = SCHEDULES["nested"].build(graph).work
    longer = SCHEDULES["nested"].build(replace(graph, num_microbatches=48)).work
    longest = SCHEDULES["nested"].build(replace(graph, num_microbatches=192)).work
    for lane in graph.lanes:
        assert longest.live_units(lane) == longer.live_units(lane) >= work.live_units(lane)
    alone = [m for m in graph.units if graph.reaches("llm", m) and len(graph.edges) == 1 + len(graph.units) - 2]
    for module in alone if len(alone) == 1 else ():
        assert work.live_units(f"{module}.0") <= 1


def one_of_each(*, p: int, encoder: int, generator: int, num_microbatches: int) -> StageGraph:
    return StageGraph(
        num_stages={"vision": 1, "llm": p, "generator": 1},
        edges=(("vision", "llm"), ("llm", "generator")),
        units={"vision": encoder, "llm": 1, "generator": generator},
        num_microbatches=num_microbatches,
        has_backward=frozenset({"vision", "llm", "generator"}),
        backbone="llm",
    )


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 7))
def test_the_least_w_is_the_closed_form(p, unit, generator, more):
    """D = p + G - 1 microbatches live on stage 0; W >= (U - 1 + D - 1) // U + 1. One less is refused by name."""
    least = (unit - 1 + p + generator - 2) // unit + 1
    graph = one_of_each(p=p, encoder=unit, generator=generator, num_microbatches=unit * (least + 2) + more)
    work = SCHEDULES["nested"].build(graph, warmup_units=least).work
    assert (work.live_units("vision.0"), work.live_units("generator.0")) == (least, 1)
    assert work.live_units("llm.0") == min(p + generator - 1, graph.num_microbatches)
    assert SCHEDULES["nested"].build(graph).work.live_units("vision.0") == least + 1
    if least > 1:
        with pytest.raises(ScheduleError, match="warmup_units") as caught:
            SCHEDULES["nested"].build(graph, warmup_units=least - 1)
        assert caught.value.got.startswith(f"{least - 1}, with units of {unit} microbatches in vision")
        assert f"llm.0F{unit * (least - 1)}< " in caught.value.got or f">F{unit * (least - 1)}<" in caught.value.got
        assert caught.value.expected.startswith(f"at least {least}:")


def test_the_least_w_is_that_of_the_hungriest_encoder():
    """Two encoders: D = 3 live microbatches ask for 3 units of 1, or 2 units of 3; W counts for both."""
    graph = StageGraph(
        num_stages={"vision": 1, "audio": 1, "llm": 3},
        edges=(("vision", "llm"), ("audio", "llm")),
        units={"vision": 1, "audio": 3, "llm": 1},
        num_microbatches=24,
        has_backward=frozenset({"vision", "audio", "llm"}),
        backbone="llm",
    )
    with pytest.raises(ScheduleError) as caught:
        SCHEDULES["nested"].build(graph, warmup_units=1)
    assert caught.value.fix.startswith("set warmup_units: 3,")
    assert "vision.0" in caught.value.got.splitlines()[2] and "waits for" in caught.value.got
    work = SCHEDULES["nested"].build(graph, warmup_units=3).work
    assert (work.live_units("vision.0"), work.live_units("audio.0")) == (3, 3)
    work = SCHEDULES["nested"].build(graph).work
    assert (work.live_units("vision.0"), work.live_units("audio.0")) == (4, 3)


def test_more_than_a_module_has_units_is_clipped():
    graph = one_of_each(p=2, encoder=2, generator=2, num_microbatches=8)
    all_of_them, more = (ScheduleChoice("nested", FrozenMap({"warmup_units": w})) for w in (4, 99))
    assert build(more, graph) == build(all_of_them, graph)


def test_three_phase_is_three_phases():
    order = SCHEDULES["three_phase"].build(one_of_each(p=2, encoder=2, generator=2, num_microbatches=8)).order
    phases = [str(a.kind) for a in order if a.module == "vision"]
    assert phases == ["F"] * 4 + ["B"] * 4
    assert {a.module for a in order[:4]} == {a.module for a in order[-4:]} == {"vision"}


@given(st.integers(1, 20), st.booleans(), st.booleans(), st.booleans())
def test_overlap_hides_what_runs_beside_the_backbone(num_microbatches, has_encoder, has_generator, at_once):
    """One rank, every forward 1 and backward 2: beside each other only the first forward and what is left behind the
    last backward show; in turns everything adds up."""
    graph = one_of_each(p=1, encoder=1, generator=1, num_microbatches=num_microbatches)
    modules = [m for m, wanted in (("vision", has_encoder), ("llm", True), ("generator", has_generator)) if wanted]
    graph = replace(
        graph,
        num_stages=dict.fromkeys(modules, 1),
        units=dict.fromkeys(modules, 1),
        edges=tuple(edge for edge in graph.edges if {*edge} <= {*modules}),
        has_backward=frozenset(modules),
        occupies={f"{module}.0": frozenset({0}) for module in modules},
        tracks={m: track for track, m in enumerate(modules, start=1) if m != "llm"} if at_once else {},
    )
    schedule = SCHEDULES["overlap"].build(graph)
    free: dict[int, int] = {}
    end: dict[Action, int] = {}
    for action in schedule.order:
        track = schedule.tracks[action.lane]
        start = max([free.get(track, 0), *[end[need] for need in schedule.needs(action)]])
        end[action] = free[track] = start + (1 if action.kind is Kind.F else 2)
    if not at_once:
        assert max(end.values()) == 3 * len(modules) * num_microbatches
        return
    alone = 3 * has_encoder + 3 * has_generator  # the first forward, the last backward; the last unit's generator
    assert max(end.values()) <= 3 * num_microbatches + alone
    if num_microbatches > 1 and has_encoder:
        assert schedule.work.live_units("vision.0") == min(num_microbatches, 2 + has_generator)


def nominal_length(schedule: Schedule, occupies: Mapping[str, frozenset[int]]) -> Fraction:
    """When the last rank is done, if each runs its part of the order as soon as it can; an encoder's unit takes as long
    as a microbatch on a stage of the backbone, a virtual stage its share."""
    free: dict[int, Fraction] = {}
    end: dict[tuple[Action, int], Fraction] = {}
    for action in schedule.order:
        share = 1 if action.module == "llm" else schedule.work.num_chunks[action.module]
        for rank in occupies[action.lane]:
            ready = [
                end[need, r]
                for need in schedule.needs(action)
                for r in occupies[need.lane]
                if need.lane != action.lane or r == rank
            ]
            start = max([free.get(rank, Fraction(0)), *ready])
            free[rank] = end[action, rank] = start + Fraction(1 if action.kind is Kind.F else 2, share)
    return max(free.values())


@pytest.mark.parametrize(("p", "chunks", "hidden"), [(2, 1, 1), (4, 1, 2), (4, 2, 5), (4, 4, 5), (6, 2, 6)])
def test_bubble_fill_hides_encoder_work_in_bubbles(p, chunks, hidden):
    """1F1B leaves each rank 3 (p - 1) idle, and under `nested` an encoder's work is added to that. At most p - 1 of it
    fit before the first backward of every rank, and in pieces of at most 1 as many where the pipeline drains."""
    graph = StageGraph(
        num_stages={"vision": 1, "llm": p},
        edges=(("vision", "llm"),),
        units={"vision": p, "llm": 1},
        num_microbatches=8 * p,
        has_backward=frozenset({"vision", "llm"}),
        backbone="llm",
        num_chunks={"vision": chunks} if chunks > 1 else {},
        occupies={"vision.0": frozenset(range(p))} | {f"llm.{s}": frozenset({s}) for s in range(p)},
    )
    nested, filled = (SCHEDULES[name].build(graph) for name in ("nested", "bubble_fill"))
    assert nominal_length(nested, graph.occupies) == 3 * (8 * p + p - 1) + 3 * 8
    assert nominal_length(filled, graph.occupies) <= nominal_length(nested, graph.occupies) - hidden
    longer = SCHEDULES["bubble_fill"].build(replace(graph, num_microbatches=32 * p))
    live = filled.work.live_units("vision.0")
    assert live == longer.work.live_units("vision.0") <= nested.work.live_units("vision.0") + p * chunks


@settings(max_examples=20)
@given(graphs("bubble_fill"))
def test_bubble_fill_is_no_longer_than_nested(graph):
    nested, filled = (SCHEDULES[name].build(graph) for name in ("nested", "bubble_fill"))
    assert nominal_length(filled, graph.occupies) <= nominal_length(nested, graph.occupies)


def test_tracks_are_those_that_have_quotas_and_share_ranks():
    modules = {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(dp=4)), "generator": ("2-3", Layout(dp=2))}
    plan = replace(make_plan(modules), schedule=ScheduleChoice("overlap"))

    def tracks(name: str, **shares: float) -> dict[str, int]:
        placed = {m: replace(each, quota=Quota(share=shares.get(m, 1.0))) for m, each in plan.modules.items()}
        limited = replace(plan, schedule=ScheduleChoice(name), modules=placed)
        return {lane: track for lane, track in build_schedule(limited, WORKLOAD).tracks.items() if track}

    assert tracks("overlap", vision=0.3, llm=0.7, generator=0.3) == {"vision.0": 1, "generator.0": 2}
    assert tracks("overlap", vision=0.3, llm=0.7) == {"vision.0": 1}
    assert tracks("overlap", llm=0.7) == tracks("overlap") == {}  # nobody else is limited: they take turns
    assert tracks("overlap", vision=0.3, generator=0.3) == {}  # they share no ranks
    assert tracks("nested", vision=0.3, llm=0.7) == {}


@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 4), st.booleans())
def test_interleaved_keeps_what_narayanan_says(p, chunks, groups, has_encoder):
    """2 (p - s - 1) + (v - 1) p warm-up forwards on stage s, and the one that alternates. An encoder runs ahead."""
    modules = ("vision", "llm") if has_encoder else ("llm",)
    graph = StageGraph(
        num_stages={"vision": 1, "llm": p} if has_encoder else {"llm": p},
        edges=(("vision", "llm"),) if has_encoder else (),
        units=dict.fromkeys(modules, 1),
        num_microbatches=p * groups,
        has_backward=frozenset(modules),
        backbone="llm",
        num_chunks={"llm": chunks},
    )
    work = SCHEDULES["interleaved"].build(graph).work
    for stage in range(p):
        alive = 2 * (p - stage - 1) + (chunks - 1) * p + 1
        assert work.live_units(f"llm.{stage}") == min(alive, p * groups * chunks)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("num_microbatches", [31, 64])
def test_chains_of_interleaved_modules_hold_few_units_whatever_the_batch(unit, num_microbatches):
    """The last of a chain keeps what it keeps alone; those before it run ahead, not through the whole batch."""

    def build(count: int) -> LaneWork:
        graph = StageGraph(
            num_stages={"vision": 2, "llm": 4, "generator": 2},
            edges=(("vision", "llm"), ("llm", "generator")),
            units={"vision": unit, "llm": 1, "generator": 1},
            num_microbatches=count,
            has_backward=frozenset({"vision", "llm", "generator"}),
            backbone="llm",
            num_chunks=dict.fromkeys(("vision", "llm", "generator"), 2),
        )
        return SCHEDULES["interleaved"].build(graph).work

    work, longer = build(num_microbatches), build(2 * num_microbatches)
    assert [work.live_units(f"generator.{stage}") for stage in (0, 1)] == [2 * 1 + 2 + 1, 2 + 1]
    for lane in work.lanes:
        assert work.live_units(lane) <= 40 and longer.live_units(lane) <= work.live_units(lane) + 8


@pytest.mark.parametrize("name", NESTING)
def test_golden(name):
    modules = {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("0-3", Layout(dp=4))}
    plan = replace(make_plan(modules, global_batch_size=8), schedule=ScheduleChoice(name))
    limited = {m: replace(placed, quota=Quota(share=0.5)) for m, placed in plan.modules.items()}
    plan = replace(plan, modules=limited)  # tracks, where a schedule knows them
    assert_golden(f"schedule_{name}", format_schedule(build_schedule(plan, WORKLOAD)))


def test_units_default_to_the_pipeline_where_modules_are_nested():
    modules = {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(pp=4)), "generator": ("0-3", Layout(dp=4))}
    plan = make_plan(modules)
    assert dict(plan.units("llm")) == {"vision": 1, "llm": 1, "generator": 1}
    nested = replace(plan, schedule=ScheduleChoice("nested"))
    assert dict(nested.units("llm")) == {"vision": 4, "llm": 1, "generator": 4}
    vision = replace(plan.modules["vision"], unit=2)
    assert replace(nested, modules={**plan.modules, "vision": vision}).units("llm")["vision"] == 2
