"""Runs one rank's part of a Schedule, in its order, and records when each action ran.

    Schedule --RankProgram.of--> tracks of this rank --perform(action), one at a time on each--> spans --> Timeline
                                      |
                                      +-- on the lanes of a quota backend: in turns, in threads, on streams

What an action does (tensors, collectives) is the caller's; the executor owns order, clock and the report of failures.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

from megatron_mosaic.colocation.backend_none import TurnLanes
from megatron_mosaic.colocation.lane import Clock, Lanes, Moment, seconds_of
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.errors import RankFailure, ScheduleError
from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.process import flight_of
from megatron_mosaic.flight.verdict import failure_of
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Action, Schedule, build_forward_only
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.text import format_schedule
from megatron_mosaic.schedules.timeline import Span

_TAKE_TURNS = TurnLanes({})
Times = tuple[float | Moment, float | Moment]  # when an action's own work began (inputs at hand) and ended


class Words:
    """What a rank is doing, in its flight: one sentence a track. After a failure, its words stay: `_failed`."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self._lock = threading.Lock()
        self._of_track: dict[int, str] = {}
        self._failed = False

    def note(self, step: int, track: int, words: str) -> None:
        """The track does this now."""
        with self._lock:
            self._of_track[track] = words
            if not self._failed:
                self.flight.note(f"step {step} {'; '.join(self._of_track.values())}")

    def fail(self, words: str) -> None:
        """This failed; later notes of other tracks do not hide it."""
        with self._lock:
            if not self._failed:
                self._failed = True
                self.flight.note(words)

    def begin(self) -> None:
        """A new step: no track has begun."""
        with self._lock:
            self._of_track.clear()


class Executor:
    """Executor of one rank under one plan.

    `spans` are those of the last step, on the machine's monotonic clock, which all ranks of a host share; `step` counts
    training steps, those before a checkpoint included. `_recorded`: spans as their moments were read.
    """

    def __init__(
        self, plan: Plan, workload: Workload, rank: int, training: Schedule, lanes: Lanes = _TAKE_TURNS
    ) -> None:
        """`training`: the schedule of training steps, the plan's own or another one of its work. `lanes`: what this
        rank's tracks run on; evaluation, which has one track, takes turns."""
        self.plan, self.workload, self.rank, self.training = plan, workload, rank, training
        self._lanes = {lane for alike in rank_classes(plan) if rank in alike.ranks for lane in alike.lanes}
        self.flight, self.lanes = flight_of(rank), lanes
        self._words = Words(self.flight)
        self._recorded: list[tuple[str, float | Moment, float | Moment, str]] = []
        self.step = 0
        self._programs: dict[tuple[int, bool], RankProgram] = {}

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

    @property
    def spans(self) -> list[Span]:
        """Of the last step, each lane's in order. Waits for the device where it keeps the time."""
        return [
            Span(self.rank, lane, seconds_of(start), seconds_of(end), label)
            for lane, start, end, label in self._recorded
        ]

    def program(self, num_microbatches: int, *, forward_only: bool = False) -> RankProgram:
        """This rank's part of a step. Evaluation: the plan's forwards, of any number of microbatches."""
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
            self._programs[key] = RankProgram.of(schedule, self._lanes)
        return self._programs[key]

    def run(self, program: RankProgram, perform: Callable[[Action, Clock], Times]) -> None:
        """Perform every track's actions in their order. `perform` returns when the action's own work began and ended.

        Collective: every rank of the plan runs its part of one schedule. RankFailure names rank, lane and action; a
        track that fails stops the others.
        """
        clock = self.lanes.clock

        is_beside = len(program.tracks) > 1
        lanes = self.lanes if is_beside else TurnLanes(self.lanes.infos, clock)

        def perform_one(action: Action) -> None:
            lane, label = action.lane, str(action)
            with self.doing(lane, label, program.track_of[action] if is_beside else None):
                start, end = perform(action, clock)
            self._recorded.append((lane, start, end, label))

        lanes.run(program, perform_one)

    def begin_step(self, *, forward_only: bool = False) -> None:
        """A new step: forget the spans of the last one."""
        self._recorded = []
        self.lanes.begin_step()
        self._words.begin()
        self.step += not forward_only

    def count_from(self, step: int) -> None:
        """So many training steps are behind us, in the run that a checkpoint comes from."""
        self.step = max(self.step, step)

    def record[Result](self, label: str, work: Callable[[], Result]) -> Result:
        """Run what belongs to no module (`~data`, `~grads`, `~optimizer`) as a span of its own lane."""
        start = self.lanes.clock()
        with self.doing(label, label):
            result = work()
        self._recorded.append((label, start, self.lanes.clock(), label))
        return result

    @contextlib.contextmanager
    def doing(self, lane: str, action: str, track: int | None = None) -> Iterator[None]:
        """Note lane and action, so that a failure inside is reported with them. `track`: where others run beside it."""
        where = f"step {self.step} lane {lane} action {action}"
        try:
            if track is None:
                self.flight.note(where)
            else:
                self._words.note(self.step, track, f"lane {lane} action {action}")
            yield
        except RankFailure:
            raise
        except Exception as error:
            self._words.fail(f"{where} failed: {type(error).__name__}")
            raise failure_of(self.flight, where, error) from error
