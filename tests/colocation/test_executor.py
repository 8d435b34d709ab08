"""The executor obeys the schedule, records it, and says where it stood when something failed."""

from dataclasses import replace

import pytest

from megatron_mosaic.colocation.backend_none import TurnLanes
from megatron_mosaic.colocation.executor import Executor
from megatron_mosaic.errors import RankFailure, ScheduleError
from megatron_mosaic.flight.line import DIRECTORY_VARIABLE, read_lines
from megatron_mosaic.plan import Layout
from megatron_mosaic.schedules import Action, Kind, build_schedule, stage_graph
from megatron_mosaic.schedules.passes import rank_programs
from megatron_mosaic.schedules.text import format_schedule, parse_schedule
from tests.cases import WORKLOAD, make_plan

PLAN = make_plan(
    {"vision": ("0-2", Layout(dp=3)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("1", Layout())}, world_size=5
)


class CountingClock:
    """Every look is one second later."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


STEP = PLAN.num_microbatches("llm")


def make_executor(rank: int, plan=PLAN) -> Executor:
    return Executor(plan, WORKLOAD, rank, build_schedule(plan, WORKLOAD), TurnLanes({}, CountingClock()))


def take_two_looks(action: Action, clock) -> tuple[float, float]:
    return clock(), clock()


@pytest.mark.parametrize("rank", range(5))
def test_performs_the_ranks_program_in_order(rank) -> None:
    executor = make_executor(rank)
    performed = []
    executor.run(
        executor.program(STEP), lambda action, clock: (performed.append(action), take_two_looks(action, clock))[1]
    )
    assert tuple(performed) == rank_programs(PLAN, executor.training)[rank]
    assert [(s.rank, s.lane, s.label) for s in executor.spans] == [(rank, a.lane, str(a)) for a in performed]
    assert [s.start_s for s in executor.spans] == [1.0 + 2 * i for i in range(len(performed))]
    assert all(span.end_s == span.start_s + 1 for span in executor.spans)
    assert bool(performed) == (rank < 4)  # rank 4 idles


def test_spans_are_those_of_the_last_step_and_of_its_tail() -> None:
    executor = make_executor(0)
    executor.begin_step()
    executor.run(executor.program(STEP), take_two_looks)
    first = [span.label for span in executor.spans]
    executor.begin_step()
    assert executor.spans == []
    executor.run(executor.program(STEP), take_two_looks)
    assert executor.record("~grads", lambda: "result") == "result"
    assert [span.label for span in executor.spans] == [*first, "~grads"]
    tail = executor.spans[-1]
    assert (tail.lane, tail.end_s - tail.start_s) == ("~grads", 1.0)
    assert executor.step == 2


def test_evaluation_runs_forwards_only_and_counts_no_step() -> None:
    executor = make_executor(1)
    executor.begin_step(forward_only=True)
    executor.run(executor.program(2, forward_only=True), take_two_looks)
    assert executor.spans and all("F" in span.label for span in executor.spans)
    assert executor.step == 0


def test_evaluation_has_any_number_of_microbatches_and_training_its_own() -> None:
    executor = make_executor(1)
    assert len(executor.program(7, forward_only=True).actions) == 7 * 3
    with pytest.raises(ScheduleError, match=rf"7 microbatches\n.*{STEP}"):
        executor.program(7)


def test_accepts_its_own_schedule_from_text() -> None:
    executor = make_executor(0)
    executor.accept(parse_schedule(format_schedule(executor.training)))


def test_refuses_another_order_and_shows_the_line() -> None:
    """Another order of the generator is legal too, but ranks with different orders would wait for each other."""
    executor = make_executor(0)
    text = format_schedule(executor.training)
    swapped = text.replace("generator.0B0 generator.0F1", "generator.0F1 generator.0B0").splitlines()
    number, line = next(p for p in enumerate(text.splitlines(), start=1) if p[1].startswith("generator.0"))
    with pytest.raises(ScheduleError) as refused:
        executor.accept(parse_schedule("\n".join(swapped[:-1]), stage_graph(PLAN, WORKLOAD)))
    assert refused.value.where == f"schedule of the run, line {number}"
    assert refused.value.got == swapped[number - 1] != line
    assert refused.value.expected == f"rank 0's: {line}"


def test_refuses_another_name_on_line_1() -> None:
    executor = make_executor(0)
    text = format_schedule(executor.training).replace("schedule 1f1b", "schedule mine")
    with pytest.raises(ScheduleError, match=r"line 1\n.*schedule mine"):
        executor.accept(parse_schedule(text))


def test_runs_a_schedule_of_its_own_order() -> None:
    """What the file says runs, though the plan's own builder would put it otherwise."""
    own = build_schedule(PLAN, WORKLOAD)
    late = sorted(own.order, key=lambda action: action.module == "vision" and action.kind is Kind.B)
    lanes = {lane: tuple(action for action in late if action.lane == lane) for lane in own.lanes}
    other = replace(own, work=replace(own.work, lanes=lanes), order=tuple(late))
    executor = Executor(PLAN, WORKLOAD, 0, other, TurnLanes({}, CountingClock()))
    assert executor.program(STEP).actions == tuple(action for action in late if action.lane in ("vision.0", "llm.0"))
    assert executor.program(STEP).actions != make_executor(0).program(STEP).actions


def test_a_failing_action_names_rank_step_lane_and_action(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    executor = make_executor(2)
    executor.begin_step()
    executor.run(executor.program(STEP), take_two_looks)
    executor.begin_step()

    def fail(action: Action, clock) -> tuple[float, float]:
        if str(action) == "llm.1B1":
            raise ZeroDivisionError("no tokens")
        return take_two_looks(action, clock)

    with pytest.raises(RankFailure) as failure:
        executor.run(executor.program(STEP), fail)
    assert failure.value.where == "rank 2, step 2 lane llm.1 action llm.1B1"
    assert failure.value.got == "ZeroDivisionError: no tokens"
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    assert read_lines(tmp_path)[2].words == "step 2 lane llm.1 action llm.1B1 failed: ZeroDivisionError"


def test_a_failure_inside_is_reported_once() -> None:
    executor = make_executor(0)
    inner = RankFailure("rank 0, inner", got="a", expected="b", fix="c")

    def fail() -> None:
        with executor.doing("llm.0", "llm.0F0"):
            raise inner

    with pytest.raises(RankFailure) as failure:
        executor.record("~grads", fail)
    assert failure.value is inner


def test_steps_before_a_checkpoint_count() -> None:
    executor = make_executor(2)
    executor.count_from(7)
    executor.begin_step()
    executor.count_from(7)  # asked again, for an evaluation
    assert executor.step == 8
