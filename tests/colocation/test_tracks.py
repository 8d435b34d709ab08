"""Tracks at the same time: each in its order, between them what needs say, no deadlock, and one failure ends all."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.colocation.backend_cpu import CpuBackend
from megatron_mosaic.colocation.executor import Executor
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.errors import QuotaError, RankFailure
from megatron_mosaic.flight.heart import Heart
from megatron_mosaic.flight.line import DIRECTORY_VARIABLE, read_lines
from megatron_mosaic.plan import Layout, Plan, ScheduleChoice
from megatron_mosaic.plan.quota import Quota
from megatron_mosaic.schedules import Action, Schedule, build_schedule
from megatron_mosaic.schedules.communication.transfers import list_transfers
from megatron_mosaic.schedules.passes import modules_by_track
from megatron_mosaic.schedules.plan_match import load_training_schedule
from megatron_mosaic.schedules.rank_classes import rank_classes
from tests.cases import WORKLOAD, make_plan, plans


def beside(layouts: dict[str, tuple[str, Layout]], world_size: int, microbatches: int = 4, **quotas: float) -> Plan:
    """A plan whose modules with a quota have tracks of their own."""
    plan = make_plan(layouts, world_size=world_size)
    slots = layouts["llm"][1].dp * plan.micro_batch_size
    modules = {name: replace(m, quota=Quota(share=quotas.get(name, 1.0))) for name, m in plan.modules.items()}
    return replace(plan, schedule=ScheduleChoice("overlap"), modules=modules, global_batch_size=microbatches * slots)


PLAN = beside(
    {"vision": ("0-1", Layout(dp=2)), "llm": ("0-1", Layout(pp=2)), "generator": ("0-1", Layout(tp=2))},
    world_size=2,
    vision=0.3,
    llm=0.4,
    generator=0.3,
)
SCHEDULE = build_schedule(PLAN, WORKLOAD)


def programs_of(plan: Plan, schedule: Schedule) -> dict[int, RankProgram]:
    return {rank: RankProgram.of(schedule, alike.lanes) for alike in rank_classes(plan) for rank in alike.ranks.ranks}


@given(plans(world_size=4))
def test_every_message_is_expected_once_and_before_it_is_needed(plan: Plan) -> None:
    """By the track that needs it, and in the order in which its sender makes it."""
    schedule = build_schedule(plan, WORKLOAD)
    place = {action: number for number, action in enumerate(schedule.order)}
    for program in programs_of(plan, schedule).values():
        expected = [t for posts in program.receives.values() for t in posts]
        own = {action.lane for action in program.actions}
        assert sorted(expected) == sorted(t for t in list_transfers(schedule) if t.target.lane in own)
        for action, posts in program.receives.items():
            for transfer in posts:
                assert action is None or program.track_of[action] == program.track_of[transfer.target]
                assert action is None or place[action] <= place[transfer.source] < place[transfer.target]
        for lane in own:
            made = [(place[t.source], t.target.unit) for t in expected if t.target.lane == lane]
            assert made == sorted(made)


def run_at_random(plan: Plan, schedule: Schedule, draw: random.Random) -> int:
    """Every track of every rank as a process that does its next action when it may; the most that ran at once.

    The strictest ranks there could be: all ranks of a stage meet in every action (collectives), and an action needs
    everything that the schedule says, wherever it ran. Who goes next is drawn.
    """
    programs = programs_of(plan, schedule)
    ranks_of = Counter(lane for alike in rank_classes(plan) for lane in alike.lanes for _ in alike.ranks.ranks)
    todo = {
        (rank, track): list(reversed(actions)) for rank, p in programs.items() for track, actions in p.tracks.items()
    }
    running: dict[Action, set[tuple[int, int]]] = {}
    done: dict[int, set[Action]] = {rank: set() for rank in programs}
    everywhere: set[Action] = set()
    most = 0
    while any(todo.values()):
        ready = []
        for (rank, track), left in todo.items():
            if left and (rank, track) not in running.get(left[-1], ()):
                waits = programs[rank].waits.get(left[-1], ())
                if done[rank].issuperset(waits) and everywhere.issuperset(schedule.needs(left[-1])):
                    ready.append((rank, track))
        whole = [action for action, at in running.items() if len(at) == ranks_of[action.lane]]
        assert ready or whole, f"deadlock: {[(key, str(left[-1])) for key, left in todo.items() if left]}"
        if ready and (not whole or draw.random() < 0.7):
            key = draw.choice(ready)
            running.setdefault(todo[key][-1], set()).add(key)
        else:
            action = draw.choice(whole)
            for rank, track in running.pop(action):
                assert todo[rank, track].pop() == action
                done[rank].add(action)
            everywhere.add(action)
        most = max(most, max(Counter(rank for at in running.values() for rank, _ in at).values(), default=0))
    return most


def test_a_thousand_interleavings_end() -> None:
    draw = random.Random(7)
    most = [run_at_random(PLAN, SCHEDULE, draw) for _ in range(1000)]
    assert max(most) >= 2, "the tracks of a rank never ran at the same time"


@st.composite
def plans_beside(draw: st.DrawFn) -> Plan:
    """Modules on any of four ranks, with tracks of their own or not."""
    layouts = {}
    for name in ("vision", "llm", "generator"):
        size = draw(st.sampled_from([1, 2, 4]))
        pp = draw(st.sampled_from([n for n in (1, 2) if n <= size and name == "llm"] or [1]))
        first = draw(st.integers(0, 4 - size))
        layouts[name] = (f"{first}-{first + size - 1}", Layout(pp=pp, dp=size // pp))
    quotas = {name: 0.3 for name in layouts if draw(st.booleans())}
    return beside(layouts, world_size=4, microbatches=draw(st.integers(1, 6)), **quotas)


@given(plans_beside(), st.integers(0, 1000))
def test_no_plan_deadlocks_however_its_tracks_run(plan, seed) -> None:
    schedule = build_schedule(plan, WORKLOAD)
    draw = random.Random(seed)
    for _ in range(5):
        run_at_random(plan, schedule, draw)


def test_an_order_that_one_track_breaks_does_deadlock() -> None:
    """The interleavings above can fail: a backward before what it needs of the other track."""
    program = RankProgram.of(SCHEDULE, SCHEDULE.lanes)
    waits = program.waits | {program.tracks[0][0]: (program.tracks[0][-1],)}
    broken = replace(program, waits=waits)

    def of(schedule, lanes):
        return broken

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="deadlock"):
        patch.setattr(RankProgram, "of", of)
        run_at_random(make_plan({m: ("0", Layout()) for m in PLAN.modules}, world_size=1), SCHEDULE, random.Random(1))


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def executor():
    backend = CpuBackend()
    lanes = backend.open({0: 0.4, 1: 0.3, 2: 0.3})
    yield Executor(PLAN, WORKLOAD, 0, SCHEDULE, lanes)
    lanes.close()


def recorder(executor: Executor, draw: random.Random, begun: list, violations: list):
    """A perform that sleeps at random and checks that all needs of this rank are done."""
    program, lock, done = executor.program(SCHEDULE.num_microbatches), threading.Lock(), set()
    here = set(program.actions)

    def perform(action, clock):
        with lock:
            begun.append((threading.get_ident(), action))
            missing = [need for need in SCHEDULE.needs(action) if need in here and need not in done]
            if missing:
                violations.append((action, missing))
            sleep_s = draw.choice([0, 0, 1e-4, 5e-4])
        start_s = clock()
        time.sleep(sleep_s)
        with lock:
            done.add(action)
        return start_s, clock()

    return program, perform


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_threads_keep_each_tracks_order_and_all_needs(executor) -> None:
    draw = random.Random(3)
    for _ in range(30):
        begun, violations = [], []
        program, perform = recorder(executor, draw, begun, violations)
        executor.begin_step()
        executor.run(program, perform)
        assert not violations, violations[0]
        for track, actions in program.tracks.items():
            ran = [(thread, action) for thread, action in begun if program.track_of[action] == track]
            assert tuple(action for _, action in ran) == actions, "a track left its order"
            assert len({thread for thread, _ in ran}) == 1
        assert len({thread for thread, _ in begun}) == 3
        assert Counter(span.label for span in executor.spans) == Counter(map(str, program.actions))


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_without_waits_an_action_runs_before_its_needs(executor) -> None:
    """The recorder can fail."""
    violations = []
    for seed in range(20):
        program, perform = recorder(executor, random.Random(seed), [], violations)
        executor.run(replace(program, waits={}), perform)
    assert violations


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_tracks_overlap_in_time(executor) -> None:
    def perform(action, clock):
        start_s = clock()
        time.sleep(0.003)
        return start_s, clock()

    executor.run(executor.program(SCHEDULE.num_microbatches), perform)
    spans = executor.spans
    assert any(a.lane != b.lane and a.start_s < b.end_s and b.start_s < a.end_s for a in spans for b in spans)


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_a_lane_that_raises_stops_the_others_and_is_named(executor, tmp_path, monkeypatch) -> None:
    begun = []

    def perform(action, clock):
        begun.append(action)
        if str(action) == "vision.0F1":
            raise ZeroDivisionError("no pixels")
        time.sleep(1e-3)
        return clock(), clock()

    executor.begin_step()
    program = executor.program(SCHEDULE.num_microbatches)
    with pytest.raises(RankFailure) as failure:
        executor.run(program, perform)
    assert failure.value.where == "rank 0, step 1 lane vision.0 action vision.0F1"
    assert failure.value.got == "ZeroDivisionError: no pixels"
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    num_begun = len(begun)
    assert num_begun < len(program.actions)
    time.sleep(0.05)
    assert len(begun) == num_begun, "a lane went on"


def ends_with(work: Callable[[], object]) -> list[BaseException]:
    """What work raises, seen from another thread: it must not hang."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "hangs"
    return errors


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_a_thread_that_cannot_be_prepared_says_so(monkeypatch) -> None:
    def take(cores, count):
        raise OSError("no such core")

    monkeypatch.setattr("megatron_mosaic.colocation.backend_cpu._take_cores", take)

    def work() -> None:
        CpuBackend().open({0: 0.4, 1: 0.3, 2: 0.3}).run(RankProgram.of(SCHEDULE, SCHEDULE.lanes), lambda action: None)

    assert list(map(str, ends_with(work))) == ["no such core"]


@pytest.mark.filterwarnings("ignore:3 tracks")
@pytest.mark.parametrize("fails_first", [True, False], ids=["before", "behind"])
def test_an_error_around_a_tracks_actions_ends_the_run(fails_first) -> None:
    @contextmanager
    def around(grad_enabled):
        if fails_first:
            raise MemoryError("no generator")
        yield
        raise MemoryError("no generator")

    lanes = CpuBackend(around).open({0: 0.4, 1: 0.3, 2: 0.3})
    program = RankProgram.of(SCHEDULE, SCHEDULE.lanes)
    assert list(map(str, ends_with(lambda: lanes.run(program, lambda action: None)))) == ["no generator"]
    lanes.close()


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_a_lane_that_waits_for_another_rank_does_not_hide_the_failure(executor, monkeypatch) -> None:
    """Nothing can wake it; the process ends with the error all the same."""
    monkeypatch.setattr("megatron_mosaic.colocation.threads._PATIENCE_S", 0.05)
    never = threading.Event()

    def perform(action, clock):
        if action.module == "llm":
            never.wait(20)  # a receive
        elif str(action) == "vision.0F1":
            raise ZeroDivisionError("no pixels")
        return clock(), clock()

    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"action vision\.0F1"):
        executor.run(executor.program(SCHEDULE.num_microbatches), perform)
    assert time.monotonic() - started < 10
    never.set()


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_the_flight_shows_what_every_track_does(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    lanes = CpuBackend().open({0: 0.4, 1: 0.3, 2: 0.3})
    executor = Executor(PLAN, WORKLOAD, 0, SCHEDULE, lanes)
    seen = set()

    def perform(action, clock):
        seen.add(read_lines(tmp_path)[0].words)
        return clock(), clock()

    executor.begin_step()
    executor.run(executor.program(SCHEDULE.num_microbatches), perform)
    lanes.close()
    assert any("lane llm.0 action llm.0" in words and "lane vision.0 action vision.0" in words for words in seen), seen
    assert all(words.startswith("step 1 lane ") for words in seen)


def test_modules_of_a_ranks_tracks() -> None:
    assert modules_by_track(SCHEDULE.tracks, ("vision.0", "llm.0", "generator.0")) == {
        0: ("llm",),
        1: ("vision",),
        2: ("generator",),
    }


def test_quotas_above_the_device_are_refused_before_anything_runs() -> None:
    plan = beside(dict.fromkeys(("vision", "llm", "generator"), ("0", Layout())), world_size=1, vision=0.6, llm=0.6)
    with pytest.raises(QuotaError) as refused:
        load_training_schedule(plan, WORKLOAD, None)
    assert "llm" in refused.value.where and "vision" in refused.value.where and "ranks 0" in refused.value.where
    assert refused.value.got == "0.6 + 0.6 = 1.2" and "vision: 0.5" in refused.value.fix


@pytest.mark.filterwarnings("ignore:3 tracks")
def test_the_heart_sees_a_lane_that_works_and_not_who_waits_for_it(tmp_path, monkeypatch) -> None:
    """The main thread waits for its lanes, and lanes for each other: the rank is busy where the work is."""
    monkeypatch.setattr("megatron_mosaic.flight.heart.BEAT_S", 0.02)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    heart = Heart(0, tmp_path)
    monkeypatch.setattr("megatron_mosaic.colocation.backend_cpu.watch_threads", heart.watch)
    lanes = CpuBackend().open({0: 0.4, 1: 0.3, 2: 0.3})
    places = set()

    def perform(action, clock):
        if str(action) == "vision.0F0":
            for _ in range(40):
                time.sleep(0.02)
                pulse = read_lines(tmp_path)[0].pulse
                places.update([pulse.place.partition(" ")[0]] if pulse and pulse.place else [])
        return clock(), clock()

    executor = Executor(PLAN, WORKLOAD, 0, SCHEDULE, lanes)
    executor.run(executor.program(SCHEDULE.num_microbatches), perform)
    lanes.close()
    assert places and not places & {"join", "_wait_for_needs", "_run"}, places
    time.sleep(0.1)
    assert "test_tracks.py" in read_lines(tmp_path)[0].pulse.place, "the main thread is looked at again"
