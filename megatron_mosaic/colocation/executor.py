"""Runs one rank's part of a Schedule, in its order, and records when each action ran.

    Schedule --project--> program of this rank --perform(action), one at a time--> spans --> Timeline

What an action does (tensors, collectives) is the caller's; the executor owns order, clock and the report of failures.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

from megatron_mosaic.errors import RankFailure, ScheduleError
from megatron_mosaic.flight.process import flight_of
from megatron_mosaic.flight.verdict import failure_of
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Action, Schedule, build_forward_only
from megatron_mosaic.schedules.passes import project
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.text import format_schedule
from megatron_mosaic.schedules.timeline import Span

Clock = Callable[[], float]


class Executor:
    """Executor of one rank under one plan.

    `spans` are those of the last step, on the machine's monotonic clock, which all ranks of a host share; `step` counts
    training steps, those before a checkpoint included.
    """

    def __init__(
        self, plan: Plan, workload: Workload, rank: int, training: Schedule, *, clock: Clock = time.monotonic
    ) -> None:
        """`training`: the schedule of training steps, the plan's own or another one of its work."""
        self.plan, self.workload, self.rank, self.training = plan, workload, rank, training
        self._lanes = {lane for alike in rank_classes(plan) if rank in alike.ranks for lane in alike.lanes}
        self.flight = flight_of(rank)
        self.spans: list[Span] = []
        self.step = 0
        self._clock = clock
        self._programs: dict[tuple[int, bool], tuple[Action, ...]] = {}

    def accept(self, schedule: Schedule) -> None:
        """ScheduleError unless this schedule of a training step is, to the letter, the executor's own: all ranks run
        one. Collectives of two ranks with different orders would wait for each other, or mix up."""
        got, expected = format_schedule(schedule).splitlines(), format_schedule(self.training).splitlines()
        for number, (theirs, ours) in enumerate(
            itertools.zip_longest(got, expected, fillvalue="no such line"), start=1
        ):
            if theirs != ours:
                raise ScheduleError(
                    f"schedule of the run, line {number}",
                    got=theirs,
                    expected=f"rank {self.rank}'s: {ours}",
                    fix="give every rank the same plan and the same schedule file",
                )

    def program(self, num_microbatches: int, *, forward_only: bool = False) -> tuple[Action, ...]:
        """This rank's actions of a step, in order. Evaluation: the plan's forwards, of any number of microbatches."""
        key = (num_microbatches, forward_only)
        if key not in self._programs:
            schedule = self.training
            if forward_only:
                schedule = build_forward_only(self.plan, self.workload, num_microbatches)
            elif num_microbatches != schedule.num_microbatches:
                raise ScheduleError(
                    "training step",
                    got=f"{num_microbatches} microbatches",
                    expected=f"{schedule.num_microbatches}, as in its schedule",
                    fix="leave out arguments that change the batch: the plan decides",
                )
            self._programs[key] = project(schedule, self._lanes)
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

    def count_from(self, step: int) -> None:
        """So many training steps are behind us, in the run that a checkpoint comes from."""
        self.step = max(self.step, step)

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
        try:
            self.flight.note(where)
            yield
        except RankFailure:
            raise
        except Exception as error:
            self.flight.note(f"{where} failed: {type(error).__name__}")
            raise failure_of(self.flight, where, error) from error
