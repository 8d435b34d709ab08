"""Schedules: text round trip, refusals, and what 1F1B promises (order, few live units, no deadlock)."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, ModulePlan, RankSet, ScheduleChoice
from megatron_mosaic.schedules import (
    PLANNED,
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    build,
    build_forward_only,
    build_schedule,
)
from megatron_mosaic.schedules.plan_match import require_schedule_of
from megatron_mosaic.schedules.stage_graph import StageGraph
from megatron_mosaic.schedules.text import format_schedule, parse_schedule
from tests.cases import BACKBONE_ONLY, WORKLOAD, make_plan, plans
from tests.goldens import assert_golden

EDGES = (("vision", "llm"), ("llm", "generator"))
ONE = """\
schedule 1f1b microbatches=2 edges=vision>llm units=vision:1,llm:1
vision.0 | vision.0F0 vision.0F1 vision.0B0 vision.0B1
llm.0    | llm.0F0 llm.0B0 llm.0F1 llm.0B1
order    | vision.0F0 llm.0F0 vision.0F1 llm.0B0 vision.0B0 llm.0F1 llm.0B1 vision.0B1
"""
NO_ORDER = ONE[: ONE.index("order")]
graphs = st.builds(
    StageGraph,
    num_stages=st.fixed_dictionaries({name: st.integers(1, 4) for name in ("vision", "llm", "generator")}),
    edges=st.sampled_from([EDGES, EDGES[:1], (), (*EDGES, ("vision", "generator"))]),
    units=st.fixed_dictionaries({"vision": st.integers(1, 3), "llm": st.just(1), "generator": st.just(1)}),
    num_microbatches=st.integers(1, 9),
    # gradients reach a module only through those after it: what stands behind a module with a backward has one too
    has_backward=st.sampled_from([frozenset({"vision", "llm", "generator"}), frozenset({"llm", "generator"})]),
)
chunked_graphs = st.builds(
    lambda graph, chunks: replace(graph, num_chunks=chunks),
    graphs,
    st.dictionaries(st.sampled_from(["vision", "llm", "generator"]), st.integers(2, 3), min_size=1),
)


@given(st.one_of(st.tuples(graphs, st.just("1f1b")), st.tuples(chunked_graphs, st.just("interleaved"))))
def test_text_round_trips_and_nothing_deadlocks(case):
    graph, name = case
    schedule = SCHEDULES[name].build(graph)  # refuses deadlocks
    assert {module: schedule.work.num_chunks[module] for module in graph.units} == {
        m: graph.chunks(m) for m in graph.units
    }
    assert parse_schedule(format_schedule(schedule)) == schedule
    without = "".join(line for line in format_schedule(schedule).splitlines(True) if not line.startswith("order"))
    assert parse_schedule(without, graph) == schedule
    order = {action: i for i, action in enumerate(schedule.order)}
    assert len(order) == sum(map(len, schedule.lanes.values()))
    assert all(order[need] < order[action] for action in order for need in schedule.needs(action))
    table = schedule.table
    assert [table.lanes[lane] for lane in table.lane] == [action.lane for action in schedule.order]
    assert list(table.kind) == [action.kind for action in schedule.order]
    assert list(table.needs) == [tuple(order[need] for need in schedule.needs(a)) for a in schedule.order]


@given(graphs)
def test_1f1b_keeps_few_units_alive(graph):
    # One unit per stage behind and itself; a longer unit may straddle one more (Narayanan et al. 2021, section 2.2).
    schedule = SCHEDULES["1f1b"].build(graph)
    for lane, actions in schedule.lanes.items():
        module, _, stage = lane.rpartition(".")
        if module not in graph.has_backward:
            assert all(action.kind is Kind.F for action in actions)
            continue
        live = most = 0
        for action in actions:
            live += 1 if action.kind is Kind.F else -1
            most = max(most, live)
        assert schedule.work.live_units(lane) == most
        size = graph.units[module]
        assert most <= -(-graph.stages_after(module, int(stage)) // size) + 1 + (size > 1)
        assert live == 0


def test_parses_and_knows_its_needs():
    schedule = parse_schedule(ONE)
    assert format_schedule(schedule) == ONE
    needs = {str(a): [str(n) for n in schedule.needs(a)] for a in schedule.order}
    assert needs["vision.0F1"] == []
    assert needs["llm.0F1"] == ["vision.0F1"]
    assert needs["llm.0B0"] == ["llm.0F0"]
    assert needs["vision.0B1"] == ["vision.0F1", "llm.0B1"]


def test_a_longer_unit_waits_for_all_it_covers():
    schedule = SCHEDULES["1f1b"].build(
        StageGraph(
            num_stages={"vision": 1, "llm": 2},
            edges=EDGES[:1],
            units={"vision": 2, "llm": 1},
            num_microbatches=3,
            has_backward=frozenset({"vision", "llm"}),
        )
    )
    assert [schedule.work.microbatches_of("vision", u) for u in range(schedule.work.num_units["vision"])] == [
        range(0, 2), range(2, 3)
    ]  # fmt: skip
    assert [str(n) for n in schedule.needs(Action.parse("vision.0B0"))] == ["vision.0F0", "llm.0B0", "llm.0B1"]
    assert [str(n) for n in schedule.needs(Action.parse("llm.0F1"))] == ["vision.0F0"]


def test_1f1b_refuses_a_unit_that_would_deadlock():
    graph = StageGraph(
        num_stages={"llm": 1, "generator": 1},
        edges=EDGES[1:],
        units={"llm": 1, "generator": 3},
        num_microbatches=3,
        has_backward=frozenset({"llm", "generator"}),
    )
    with pytest.raises(ScheduleError, match=r"modules\.generator\.unit"):
        SCHEDULES["1f1b"].build(graph)


@pytest.mark.parametrize("text", ["0F3", "llm.0F", "llm.F3", "Llm.0F3", "llm.0F3x", "llm.0X3", "llm.0v0F3", "llm.0F-1"])
def test_action_refuses(text):
    with pytest.raises(ScheduleError, match=r"llm\.0F3"):
        Action.parse(text)


def test_action_text():
    action = Action("llm", 1, Kind.B, 3, chunk=2)
    assert (str(action), action.lane, Action.parse("llm.1v2B3")) == ("llm.1v2B3", "llm.1", action)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schedule 1f1b", "shedule 1f1b", "line 1"),
        ("microbatches=2", "microbatches=x", "line 1"),
        ("microbatches=2", "microbatches=0", "1 to 1048576"),
        ("microbatches=2", "microbatches=1048577", "1 to 1048576"),
        ("microbatches=2", "microbatches=" + "9" * 5000, "line 1"),
        ("units=vision:1", "units=vision:x", "vision:x"),
        ("units=vision:1", "units=vision:²", "vision:²"),
        ("units=vision:1", "units=vision:0", "1 to 1048576"),
        ("units=vision:1", "units=vision:9999999", "1 to 1048576"),
        ("units=vision:1", "units=vision:1,vision:1", "each module once"),
        ("units=vision:1", "units=audio:1,vision:1", "no lanes of"),
        (ONE[ONE.index("\n") :], "", "no lanes of"),
        ("llm.0F0", "llm.0F" + "9" * 5000, "action"),
        ("units=vision:1,llm:1", "units=vision:1", "lane of llm, which has no unit\n.*a lane of vision"),
        ("edges=vision>llm", "edges=vision-llm", "line 1"),
        ("edges=vision>llm", "edges=audio>llm", "edges\n.*audio"),
        ("llm.0    |", "llm.0     ", "line 3"),
        ("llm.0    |", "vision.0 |", "line 3"),
        ("llm.0B0 ", "", r"no llm.0B0\nllm.0 \| >F0< F1 B1  is all of unit 0\n.*B and F of each unit"),
        ("llm.0B0 ", "llm.0B0 llm.0B0 ", "llm.0B0\n.*B and F of each unit"),
        ("llm.0B0 ", "llm.0W0 ", "kinds B, F, W\n.*F, I and W"),
        ("llm.0F0 ", "llm.0F7 ", "llm.0F7\n.*B and F of each unit 0..1"),
        ("llm.0B0 ", "vision.0B0 ", "actions of llm.0 only"),
        ("vision.0B1\nllm", "vision.0B1\nllm.2 | \nllm", "llm.1 among them"),
        ("order    |", "ordre    |", "lane ordre\n.*no unit"),
        ("vision.0F0 llm.0F0 v", "vision.0F0 v", "1 actions less, e.g. llm.0F0|llm.0F0"),
        ("llm.0F1 llm.0B1 v", "llm.0F1 llm.0B1 llm.0B1 v", "stands there twice"),
        ("order    |", "order    | llm.7F0", "llm.7F0, which no lane has"),
        ("order    |", "order    | llm.0F9", "llm.0F9, which no lane has"),
        (ONE[ONE.index("order") :], "", "name the plan"),
        (ONE[-1], "\ntracks | vision.0", "LANE:COUNT"),
        (ONE[-1], "\ntracks | audio.0:1", "tracks from 0 on, of vision.0, llm.0"),
        (ONE[-1], "\ntracks | vision.0:1 vision.0:2", "each lane once"),
    ],
)
def test_parse_refuses(old, new, message):
    assert old in ONE
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(new.join(ONE.rsplit(old, 1)) if old == ONE[-1] else ONE.replace(old, new, 1))


VISION_LLM = StageGraph(
    num_stages={"vision": 1, "llm": 1},
    edges=EDGES[:1],
    units={"vision": 1, "llm": 1},
    num_microbatches=2,
    has_backward=frozenset({"vision", "llm"}),
)


@pytest.mark.parametrize(
    ("old", "new", "picture"),
    [
        (
            "llm.0F0 llm.0B0",
            "llm.0B0 llm.0F0",
            """\
lanes that wait for each other:
vision.0 | F0 F1 >B0< B1  waits for llm.0B0 (llm.0 stands at llm.0B0)
llm.0    | >B0< F0 F1 B1  waits for llm.0F0 (llm.0 stands at llm.0B0)""",
        ),
        (
            "vision.0F0 vision.0F1 vision.0B0",
            "vision.0F1 vision.0B0 vision.0F0",
            """\
lanes that wait for each other:
vision.0 | F1 >B0< F0 B1   waits for vision.0F0 (vision.0 stands at vision.0B0), llm.0B0 (llm.0 stands at llm.0F0)
llm.0    | >F0< B0 F1 B1  waits for vision.0F0 (vision.0 stands at vision.0B0)""",
        ),
    ],
)
def test_a_deadlock_is_a_picture(old, new, picture):
    with pytest.raises(ScheduleError) as caught:
        parse_schedule(NO_ORDER.replace(old, new, 1), VISION_LLM)
    assert caught.value.got.replace("   waits", "  waits") == picture.replace("   waits", "  waits")


def test_an_order_against_a_need_is_a_picture():
    """One action swapped with what it needs: who waits for whom, and where that stands."""
    swapped = ONE.replace("llm.0B0 vision.0B0 llm.0F1", "vision.0B0 llm.0B0 llm.0F1")
    with pytest.raises(ScheduleError) as caught:
        parse_schedule(swapped)
    assert caught.value.got == (
        "order | ... llm.0F0 vision.0F1 [vision.0B0] llm.0B0 llm.0F1 ...\n"
        "        vision.0B0 waits for llm.0B0 (its need), 1 place later"
    ).replace("... llm.0F0", "vision.0F0 llm.0F0").replace("llm.0F1 ...", "llm.0F1 llm.0B1 ...")
    late = ONE.replace("vision.0F0 llm.0F0 vision.0F1 llm.0B0", "vision.0F1 vision.0F0 llm.0F0 llm.0B0")
    with pytest.raises(ScheduleError, match=r"vision.0F1 waits for vision.0F0 \(before it in lane vision.0\), 1 place"):
        parse_schedule(late)


def test_tracks_are_written_where_a_lane_is_off_track_0():
    text = ONE + "tracks   | vision.0:1\n"
    schedule = parse_schedule(text)
    assert (format_schedule(schedule), dict(schedule.tracks)) == (text, {"vision.0": 1, "llm.0": 0})
    assert schedule != parse_schedule(ONE)


def test_split_backwards_have_needs():
    """W waits for its own I alone, wherever it stands; the stage before waits for I."""
    lanes = {
        "llm.0": "llm.0F0 llm.0F1 llm.0I0 llm.0I1 llm.0W0 llm.0W1",
        "llm.1": "llm.1F0 llm.1I0 llm.1F1 llm.1I1 llm.1W0 llm.1W1",
    }
    text = "schedule zb microbatches=2 edges= units=llm:1\n" + "".join(f"{k} | {v}\n" for k, v in lanes.items())
    graph = StageGraph(
        num_stages={"llm": 2}, edges=(), units={"llm": 1}, num_microbatches=2, has_backward=frozenset({"llm"})
    )
    schedule = parse_schedule(text, graph)
    needs = {str(a): [str(n) for n in schedule.needs(a)] for a in schedule.order}
    assert (needs["llm.0I1"], needs["llm.0W1"], needs["llm.1I0"]) == (["llm.0F1", "llm.1I1"], ["llm.0I1"], ["llm.1F0"])
    assert schedule.work.live_units("llm.0") == 2
    with pytest.raises(ScheduleError, match="split backwards are not built yet"):
        require_schedule_of(graph, schedule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_microbatches": 3}, "microbatches"),
        ({"edges": ()}, "edges"),
        ({"units": {"vision": 2, "llm": 1}}, "units"),
        ({"num_stages": {"vision": 1, "llm": 2}}, "stages"),
        ({"num_chunks": {"llm": 2}}, "chunks"),
        ({"has_backward": frozenset({"llm"})}, "kinds"),
    ],
)
def test_a_file_must_be_of_the_plans_work(change, message):
    require_schedule_of(VISION_LLM, parse_schedule(ONE))
    with pytest.raises(ScheduleError, match=f"schedule '1f1b': {message}"):
        require_schedule_of(replace(VISION_LLM, **change), parse_schedule(ONE))


def test_builders_refuse_parameters_that_they_do_not_know():
    with pytest.raises(ScheduleError, match=r"schedule\.warmup_units\n.*\n.*it has none"):
        build(ScheduleChoice("1f1b", FrozenMap({"warmup_units": 2})), VISION_LLM)


def _plan(**layouts):
    starts = {"vision": 0, "llm": 0, "generator": 0}
    return make_plan({n: (f"{starts[n]}-{x.num_ranks - 1}", x) for n, x in layouts.items()}, global_batch_size=6)


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("1f1b_colocated", {"vision": Layout(dp=4), "llm": Layout(dp=2, tp=2), "generator": Layout(dp=4)}),
        ("1f1b_llm_pp2", {"vision": Layout(dp=4), "llm": Layout(tp=2, pp=2), "generator": Layout(dp=4)}),
        ("1f1b_llm_pp4", {"vision": Layout(pp=2, dp=2), "llm": Layout(pp=4), "generator": Layout(dp=4)}),
    ],
)
def test_1f1b_golden(name, layouts):
    plan = _plan(**layouts)
    assert_golden(f"schedule_{name}", format_schedule(build_schedule(plan, WORKLOAD)))


def test_interleaved_golden():
    plan = replace(
        make_plan(
            {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(pp=2, vpp=2, dp=2)), "generator": ("3", Layout())},
            global_batch_size=8,
        ),
        schedule=ScheduleChoice("interleaved"),
    )
    assert_golden("schedule_interleaved", format_schedule(build_schedule(plan, WORKLOAD)))
    with pytest.raises(ScheduleError, match="no module with vpp"):
        build_schedule(replace(_plan(llm=Layout(pp=2)), schedule=ScheduleChoice("interleaved")), BACKBONE_ONLY)


def test_forward_only():
    plan = _plan(vision=Layout(dp=4), llm=Layout(pp=2, dp=2), generator=Layout(dp=4))
    schedule = build_forward_only(plan, WORKLOAD, 3)
    assert schedule.name == "forward_only"
    assert not schedule.work.has_backward("llm")
    assert [str(a) for a in schedule.lanes["llm.1"]] == ["llm.1F0", "llm.1F1", "llm.1F2"]


@pytest.mark.parametrize("name", [*PLANNED, "magic"])
def test_refuses_schedules_by_name(name):
    plan = _plan(vision=Layout(dp=4), llm=Layout(dp=4), generator=Layout(dp=4))
    plan = replace(plan, schedule=ScheduleChoice(name))
    with pytest.raises(ScheduleError) as caught:
        build_schedule(plan, WORKLOAD)
    assert name in caught.value.got
    assert ("not built yet" in caught.value.got) == (name in PLANNED)
    assert "1f1b" in caught.value.expected


def test_refuses_virtual_stages():
    plan = make_plan({"llm": ("0-1", Layout(pp=2))})
    wide = ModulePlan(ranks=RankSet.parse("0-1"), layout=Layout(pp=2, vpp=2))
    plan = replace(plan, modules={"llm": wide})
    with pytest.raises(ScheduleError, match=r"modules\.llm\.layout\.vpp"):
        build_schedule(plan, BACKBONE_ONLY)


@given(plans())
def test_every_plan_has_a_schedule(plan):
    schedule = build_schedule(plan, WORKLOAD)
    assert isinstance(schedule, Schedule)
    assert schedule.num_microbatches == plan.num_microbatches("llm")
