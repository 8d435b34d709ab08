"""The executor obeys the schedule, records it, and says where it stood when something failed."""

import pytest

from megatron_mosaic.colocation.executor import Executor
from megatron_mosaic.colocation.flight import DIRECTORY_VARIABLE, read_flights
from megatron_mosaic.errors import RankFailure, ScheduleError
from megatron_mosaic.plan import Layout
from megatron_mosaic.schedules.passes import rank_programs
from megatron_mosaic.schedules.schedule import Action
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
    return Executor(plan, WORKLOAD, rank, clock=CountingClock())


def take_two_looks(action: Action, clock) -> tuple[float, float]:
    return clock(), clock()


def with_line(text: str, number: int, line: str) -> str:
    lines = text.splitlines()
    lines[number - 1] = line
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("rank", range(5))
def test_performs_the_ranks_program_in_order(rank) -> None:
    executor = make_executor(rank)
    performed = []
    executor.run(
        executor.program(3), lambda action, clock: (performed.append(action), take_two_looks(action, clock))[1]
    )
    assert tuple(performed) == rank_programs(PLAN, executor.planned(3))[rank]
    assert [(s.rank, s.lane, s.label) for s in executor.spans] == [(rank, a.lane, str(a)) for a in performed]
    assert [s.start_s for s in executor.spans] == [1.0 + 2 * i for i in range(len(performed))]
    assert all(span.end_s == span.start_s + 1 for span in executor.spans)
    assert bool(performed) == (rank < 4)  # rank 4 idles


def test_spans_are_those_of_the_last_step_and_of_its_tail() -> None:
    executor = make_executor(0)
    executor.begin_step()
    executor.run(executor.program(2), take_two_looks)
    first = [span.label for span in executor.spans]
    executor.begin_step()
    assert executor.spans == []
    executor.run(executor.program(2), take_two_looks)
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


def test_accepts_the_plans_own_schedule_from_text() -> None:
    executor = make_executor(0)
    executor.accept(parse_schedule(format_schedule(executor.planned(STEP))))


def test_refuses_another_order_and_shows_the_line() -> None:
    """Another order of the generator is legal too, but it is not what the plan's simulation promised."""
    executor = make_executor(0)
    text = format_schedule(executor.planned(STEP))
    number, line = next(pair for pair in enumerate(text.splitlines(), start=1) if pair[1].startswith("generator.0"))
    swapped = line.replace("generator.0B0 generator.0F1", "generator.0F1 generator.0B0")
    assert swapped != line
    with pytest.raises(ScheduleError) as refused:
        executor.accept(parse_schedule(with_line(text, number, swapped)))
    assert refused.value.where == f"schedule of the run, line {number}"
    assert refused.value.got == swapped
    assert refused.value.expected.endswith(line)


def test_refuses_another_number_of_microbatches() -> None:
    """A schedule of 7 microbatches is consistent in itself, but no step of this plan has 7."""
    executor = make_executor(0)
    with pytest.raises(ScheduleError, match=r"line 1\n.*microbatches=7"):
        executor.accept(executor.planned(7))


def test_refuses_the_same_lanes_in_another_order() -> None:
    """The order of lanes decides which of two lanes on a rank goes first, so it is part of what was simulated."""
    executor = make_executor(0)
    header, first, second, *rest = format_schedule(executor.planned(STEP)).splitlines()
    with pytest.raises(ScheduleError, match="line 2"):
        executor.accept(parse_schedule("\n".join([header, second, first, *rest])))


def test_refuses_another_name_on_line_1() -> None:
    executor = make_executor(0)
    text = format_schedule(executor.planned(STEP)).replace("schedule 1f1b", "schedule mine")
    with pytest.raises(ScheduleError, match=r"line 1\n.*schedule mine"):
        executor.accept(parse_schedule(text))


def test_refuses_a_lane_the_plan_has_not() -> None:
    executor = make_executor(0)
    text = format_schedule(executor.planned(STEP))
    extra = "generator.1 | " + " ".join(f"generator.1F{unit} generator.1B{unit}" for unit in range(STEP))
    last = len(text.splitlines())
    with pytest.raises(ScheduleError) as refused:
        executor.accept(parse_schedule(text + extra + "\n"))
    assert refused.value.where == f"schedule of the run, line {last + 1}"
    assert refused.value.got == extra


def test_a_failing_action_names_rank_step_lane_and_action(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    executor = make_executor(2)
    executor.begin_step()
    executor.run(executor.program(2), take_two_looks)
    executor.begin_step()

    def fail(action: Action, clock) -> tuple[float, float]:
        if str(action) == "llm.1B1":
            raise ZeroDivisionError("no tokens")
        return take_two_looks(action, clock)

    with pytest.raises(RankFailure) as failure:
        executor.run(executor.program(2), fail)
    assert failure.value.where == "rank 2, step 2 lane llm.1 action llm.1B1"
    assert failure.value.got == "ZeroDivisionError: no tokens"
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    assert read_flights(tmp_path) == {2: "step 2 lane llm.1 action llm.1B1 failed: ZeroDivisionError"}


def test_a_failure_inside_is_reported_once() -> None:
    executor = make_executor(0)
    inner = RankFailure("rank 0, inner", got="a", expected="b", fix="c")

    def fail() -> None:
        with executor.doing("llm.0", "llm.0F0"):
            raise inner

    with pytest.raises(RankFailure) as failure:
        executor.record("~grads", fail)
    assert failure.value is inner
