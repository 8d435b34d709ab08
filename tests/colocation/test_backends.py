"""Every quota backend under one contract; the CUDA ones against a driver and streams that keep the real ones' rules.

No GPU: `fake_cuda` says what that can show. With one, the tests marked `gpu` run the same contract for real.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_mosaic.colocation import backend as table
from megatron_mosaic.colocation.backend import choose_backend, open_lanes
from megatron_mosaic.colocation.backend_cpu import CpuBackend
from megatron_mosaic.colocation.backend_green_context import GreenContextBackend
from megatron_mosaic.colocation.backend_none import NoBackend
from megatron_mosaic.colocation.backend_streams import EventMoment, StreamsBackend
from megatron_mosaic.colocation.lane import seconds_of
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.errors import QuotaError
from megatron_mosaic.plan import Layout
from megatron_mosaic.runtime.flags.mosaic import QUOTA_BACKENDS
from megatron_mosaic.schedules import Action, build_schedule
from tests.cases import WORKLOAD
from tests.colocation.fake_cuda import FakeDriver, FakeStreams
from tests.colocation.test_tracks import beside

PLAN = beside(
    {"vision": ("0", Layout()), "llm": ("0", Layout()), "generator": ("0", Layout())},
    world_size=1,
    microbatches=6,
    vision=0.3,
    llm=0.7,
)
SCHEDULE = build_schedule(PLAN, WORKLOAD)
PROGRAM = RankProgram.of(SCHEDULE, SCHEDULE.lanes)
SHARES = {0: 0.7, 1: 0.3}
NAMES = ("green_context", "streams", "cpu", "none")


@pytest.fixture
def cuda(monkeypatch):
    """Streams and events that record; everything else of torch.cuda stays away."""
    fake = FakeStreams()
    for name, value in {
        "Stream": fake.new,
        "ExternalStream": fake.new,
        "Event": fake.Event,
        "stream": fake.stream,
        "current_stream": lambda *args: fake.current,
        "current_device": lambda: 0,
        "synchronize": lambda *args: None,
        "get_device_properties": lambda *args: type("P", (), {"multi_processor_count": 132}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


@pytest.fixture(params=NAMES)
def backend(request, cuda):
    made = {
        "green_context": lambda: GreenContextBackend(FakeDriver(), 0),
        "streams": StreamsBackend,
        "cpu": CpuBackend,
        "none": NoBackend,
    }
    return made[request.param]()


def test_the_table_is_what_the_flag_offers(backend) -> None:
    assert QUOTA_BACKENDS == table.NAMES == ("auto", *NAMES)
    assert backend.name in NAMES and isinstance(backend.why_not(), str)


@pytest.mark.filterwarnings("ignore:2 tracks")
def test_every_backend_runs_each_track_in_order_and_needs_first(backend, cuda) -> None:
    """`done`: what is certainly over when an action begins, on the device or in the thread."""
    lanes = backend.open(SHARES)
    assert dict(lanes.infos) == dict(backend.quantise(SHARES)) and set(lanes.infos) == {0, 1}
    is_launched = backend.name in ("green_context", "streams")
    begun, over = [], set()

    def perform(action):
        done = cuda.launch(action) if is_launched else frozenset(over)
        missing = set(SCHEDULE.needs(action)) - done
        assert not missing, f"{action} may begin before {[str(need) for need in missing]}"
        begun.append(action)
        over.add(action)

    lanes.begin_step()
    lanes.run(PROGRAM, perform)
    for actions in PROGRAM.tracks.values():
        assert tuple(action for action in begun if action in actions) == actions
    if not backend.caps.beside or is_launched:
        assert tuple(begun) == PROGRAM.actions, "one host thread launches in the schedule's order"
    if is_launched:
        assert cuda.current.seen >= set(PROGRAM.actions), "the caller's stream goes on before the lanes have ended"
    start, end = lanes.clock(), lanes.clock()
    assert seconds_of(start) <= seconds_of(end)
    with lanes.building(0):
        pass
    assert lanes.in_threads is (backend.name == "cpu")  # draws of one thread come in the schedule's order
    lanes.close()


@pytest.mark.filterwarnings("ignore:2 tracks")
def test_an_error_of_any_lane_is_the_backends(backend, cuda) -> None:
    lanes = backend.open(SHARES)

    def perform(action):
        if str(action) == "vision.0F1":
            raise ZeroDivisionError("no pixels")

    with pytest.raises(ZeroDivisionError):
        lanes.run(PROGRAM, perform)
    lanes.close()


def test_grants_are_counted_in_what_they_are(backend) -> None:
    infos = backend.quantise(SHARES)
    assert {info.track: info.share for info in infos.values()} == SHARES
    if backend.caps.disjoint and next(iter(infos.values())).total >= 2:
        assert sum(info.granted for info in infos.values()) == next(iter(infos.values())).total


# -- streams ---------------------------------------------------------------------------------------------------------


def streams_of_run(cuda: FakeStreams, program: RankProgram) -> dict:
    lanes, at = StreamsBackend().open(SHARES), {}

    def perform(action):
        cuda.launch(action)
        at[action] = cuda.current.name

    lanes.run(program, perform)
    return at


def strays(at: dict) -> list:
    """Backwards that did not run on the stream of their forward."""
    backwards = [action for action in at if action.kind == "B"]
    assert backwards
    return [action for action in backwards if at[action] != at[action._replace(kind="F")]]


def test_backward_runs_in_its_forwards_lane(cuda) -> None:
    at = streams_of_run(cuda, PROGRAM)
    assert strays(at) == []
    assert len({at[a] for a in PROGRAM.tracks[0] if a not in PROGRAM.alone}) == 1
    assert {at[a] for a in PROGRAM.tracks[1]}.isdisjoint(at[a] for a in PROGRAM.tracks[0])


def test_a_backward_in_another_lane_is_seen(cuda) -> None:
    moved = [action for action in PROGRAM.tracks[1] if action.kind == "B"]
    own = {action: track for track, actions in PROGRAM.tracks.items() for action in actions} | dict.fromkeys(moved, 0)
    tracks = {track: tuple(a for a in PROGRAM.actions if own[a] == track) for track in PROGRAM.tracks}
    waits = PROGRAM.waits | {a: (*PROGRAM.waits.get(a, ()), a._replace(kind="F")) for a in moved}
    assert set(moved) <= set(strays(streams_of_run(cuda, replace(PROGRAM, tracks=tracks, waits=waits))))


def test_what_runs_when_the_others_are_done_has_the_whole_device(cuda) -> None:
    """Vision is done first here: the backbone's units begin after its last action."""
    vision, backbone = PROGRAM.tracks[1], PROGRAM.tracks[0]
    program = RankProgram(actions=vision + backbone, tracks=PROGRAM.tracks, waits={})
    assert program.alone == frozenset(backbone)
    at = streams_of_run(cuda, program)
    whole = {at[action] for action in backbone}
    assert len(whole) == 1 and whole.isdisjoint(at[action] for action in vision)


def test_a_track_keeps_its_order_across_its_streams(cuda) -> None:
    """llm.0B0 belongs to a quota's stream, llm.0F1 before and llm.0B1 after it to that of the whole device."""
    actions = tuple(map(Action.parse, ["llm.0F0", "vision.0F0", "llm.0F1", "llm.0B0", "llm.0B1"]))
    program = RankProgram(
        actions=actions, tracks={0: tuple(a for a in actions if a.module == "llm"), 1: actions[1:2]}, waits={}
    )
    assert {str(action) for action in program.alone} == {"llm.0F1", "llm.0B1"}
    lanes, begun = StreamsBackend().open(SHARES), []

    def perform(action):
        done = cuda.launch(action)
        if action.module == "llm":
            assert {a for a in begun if a.module == "llm"} <= done
        if action in program.alone:
            assert set(begun) <= done, "it runs on all SMs beside a lane with a quota"
        begun.append(action)

    lanes.run(program, perform)
    assert tuple(begun) == actions


def test_without_events_a_lane_begins_before_its_needs(cuda) -> None:
    """The contract above can fail: this is what it would see."""
    lanes, early = StreamsBackend().open(SHARES), []

    def perform(action):
        early.extend(set(SCHEDULE.needs(action)) - cuda.launch(action))

    lanes.run(replace(PROGRAM, waits={}), perform)
    assert early


def test_moments_are_on_the_hosts_clock(cuda) -> None:
    base, event = cuda.Event(), cuda.Event()
    assert EventMoment(event, base, 100.0).seconds() == 100.0 + 1e-3


# -- green contexts --------------------------------------------------------------------------------------------------


def test_lanes_of_the_same_counts_are_opened_once(cuda) -> None:
    driver = FakeDriver()
    made = GreenContextBackend(driver, 0)
    first = made.open({0: 0.667, 1: 0.333})
    assert made.open({0: 0.66667, 1: 0.33333}) is first
    assert made.open({0: 0.5, 1: 0.5}) is not first
    assert sum(call[0] == "cuDevSmResourceSplitByCount" for call in driver.calls) == 2


def test_cores_are_counted_on_a_cpu_alone_and_before_lanes_are_open(cuda, monkeypatch) -> None:
    def refuse(self, shares):
        raise QuotaError("cores", got="none", expected="some", fix="more")

    opened = []
    monkeypatch.setattr(CpuBackend, "quantise", refuse)
    monkeypatch.setattr(NoBackend, "open", lambda self, shares: opened.append(shares))
    arguments = ({0: ("llm",), 1: ("vision",)}, {"llm": 0.5, "vision": 0.5}, torch.set_grad_enabled)
    with pytest.raises(QuotaError, match="cores"):
        open_lanes("none", *arguments)
    assert not opened
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert open_lanes("streams", *arguments).threads == {}


def test_shares_that_cannot_be_granted_name_those_that_can(cuda) -> None:
    with pytest.raises(QuotaError) as caught:
        GreenContextBackend(FakeDriver(), 0).open({0: 0.97, 1: 0.03})
    assert "1: 0.06061 (8 SMs)" in caught.value.fix
    infos = GreenContextBackend(FakeDriver(), 0).quantise({0: 0.5, 1: 0.5})
    assert [info.granted for info in infos.values()] == [64, 68]


# -- the choice ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_works_and_says_why_not_the_others() -> None:
    choice = choose_backend("auto", lambda grad_enabled: torch.set_grad_enabled(grad_enabled))
    assert choice.backend.name == "cpu"
    assert list(choice.passed) == ["green_context", "streams"]
    assert all("no CUDA device" in why for why in choice.passed.values())


@pytest.mark.parametrize(
    ("name", "words"), [("green_context", "no CUDA device"), ("gpu", "one of auto, green_context")]
)
def test_a_backend_that_is_not_here_is_refused(name, words) -> None:
    with pytest.raises(QuotaError, match=words):
        choose_backend(name, lambda grad_enabled: torch.set_grad_enabled(grad_enabled))


def test_one_connection_is_explained(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in StreamsBackend().why_not()
    assert "tp or cp above 1 before Blackwell" in GreenContextBackend().why_not()


@pytest.mark.parametrize(("version", "words"), [(12070, "CUDA 12070 of the driver, 12080 needed"), (12080, "")])
def test_old_drivers_have_no_green_streams(version, words) -> None:
    assert GreenContextBackend(FakeDriver(version=version), 0).why_not() == words


@pytest.mark.filterwarnings("ignore:2 tracks")
def test_a_rank_of_one_track_needs_no_backend() -> None:
    alone = open_lanes("auto", {0: ("llm",)}, {"llm": 0.5}, lambda g: torch.set_grad_enabled(g))
    assert alone.notes == () and set(alone.threads) == {"llm"}
    two = open_lanes("none", {0: ("llm",), 1: ("vision",)}, {"llm": 1.0, "vision": 0.3}, lambda g: torch.no_grad())
    assert "quota backend none: track 0 (llm)" in two.notes[0]
    assert set(two.threads) == {"llm", "vision"}


def test_cores_of_tracks_are_disjoint_and_of_the_rank(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    taken = []
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: taken.append(tuple(cores)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: taken.append(count))
    lanes = CpuBackend().open({0: 0.75, 1: 0.25})
    lanes.close()
    assert sorted(map(str, taken)) == sorted(["(4, 5, 6)", "3", "(7,)", "1"])


def test_fewer_cores_than_tracks_warns_and_gives_each_a_thread(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with pytest.warns(UserWarning, match=r"2 tracks on 1 core.*not enforced"):
        lanes = CpuBackend().open(SHARES)
    assert [info.granted for info in lanes.infos.values()] == [1, 1]
    lanes.close()


def test_importing_every_backend_touches_no_cuda() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import megatron_mosaic.colocation.backend; "
        "assert not torch.cuda.is_initialized(); "
        "assert not [name for name in set(sys.modules) - before if name.startswith('cuda')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
