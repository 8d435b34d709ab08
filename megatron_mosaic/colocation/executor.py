"""Runs one rank's part of a Schedule, in its order, and records when each action ran.

    Schedule --rank_programs--> program of this rank --perform(action), one at a time--> spans --> Timeline

What an action does (tensors, collectives) is the caller's; the executor owns order, clock and the report of failures.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

from megatron_mosaic.colocation.flight import Flight
from megatron_mosaic.errors import RankFailure, ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import build_forward_only, build_schedule
from megatron_mosaic.schedules.passes import rank_programs
from megatron_mosaic.schedules.schedule import Action, Schedule
from megatron_mosaic.schedules.text import format_schedule
from megatron_mosaic.schedules.timeline import Span

Clock = Callable[[], float]


class Executor:
    """Executor of one rank under one plan.

    `spans` are those of the last step, on the machine's monotonic clock, which all ranks of a host share; `step` counts
    training steps.
    """

    def __init__(self, plan: Plan, workload: Workload, rank: int, *, clock: Clock = time.monotonic) -> None:
        self.plan, self.workload, self.rank = plan, workload, rank
        self.flight = Flight(rank)
        self.spans: list[Span] = []
        self.step = 0
        self._clock = clock
        self._programs: dict[tuple[int, bool], tuple[Action, ...]] = {}

    def planned(self, num_microbatches: int, *, forward_only: bool = False) -> Schedule:
        """The plan's own schedule for a step of this many microbatches."""
        if forward_only:
            return build_forward_only(self.plan, self.workload, num_microbatches)
        return build_schedule(self.plan, self.workload, num_microbatches)

    def accept(self, schedule: Schedule) -> None:
        """ScheduleError unless this is, to the letter, the plan's schedule of a training step.

        The order of lanes counts too: it decides which of two lanes on a rank goes first.
        """
        planned = self.planned(self.plan.num_microbatches(self.workload.backbone.name))
        got, expected = format_schedule(schedule).splitlines(), format_schedule(planned).splitlines()
        for number, (ours, theirs) in enumerate(
            itertools.zip_longest(got, expected, fillvalue="no such line"), start=1
        ):
            if ours != theirs:
                raise ScheduleError(
                    f"schedule of the run, line {number}",
                    got=ours,
                    expected=f"the plan's own: {theirs}",
                    fix="run the schedule that the plan names, or make a plan with the one you want",
                )

    def program(self, num_microbatches: int, *, forward_only: bool = False) -> tuple[Action, ...]:
        """This rank's actions of a step, in order."""
        key = (num_microbatches, forward_only)
        if key not in self._programs:
            planned = self.planned(num_microbatches, forward_only=forward_only)
            self._programs[key] = rank_programs(self.plan, planned)[self.rank]
        return self._programs[key]

    def run(self, program: Iterable[Action], perform: Callable[[Action, Clock], tuple[float, float]]) -> None:
        """Perform the actions in their order. `perform` returns when the action's own work began and ended.

        Collective: every rank of the plan runs its part of one schedule. RankFailure names rank, lane and action.
        """
        for action in program:
            with self.doing(action.lane, str(action)):
                start_s, end_s = perform(action, self._clock)
            self.spans.append(Span(self.rank, action.lane, start_s, end_s, str(action)))

    def begin_step(self, *, forward_only: bool = False) -> None:
        """A new step: forget the spans of the last one."""
        self.spans = []
        self.step += not forward_only

    def record[Result](self, label: str, work: Callable[[], Result]) -> Result:
        """Run what belongs to no module (`~data`, `~grads`, `~optimizer`) as a span of its own lane."""
        start_s = self._clock()
        with self.doing(label, label):
            result = work()
        self.spans.append(Span(self.rank, label, start_s, self._clock(), label))
        return result

    @contextlib.contextmanager
    def doing(self, lane: str, action: str) -> Iterator[None]:
        """Note lane and action, so that a failure inside is reported with them."""
        where = f"step {self.step} lane {lane} action {action}"
        self.flight.note(where)
        try:
            yield
        except RankFailure:
            raise
        except Exception as error:
            self.flight.fail(f"{where} failed: {type(error).__name__}")
            raise RankFailure(
                f"rank {self.rank}, {where}",
                got=f"{type(error).__name__}: {error}",
                expected="the action to finish",
                fix="see the traceback above; if it says a connection closed, another rank failed first",
            ) from error
