"""The one clock: when each action of a program starts and ends.

An action occupies its lane's resources; it starts when they are free and its inputs have arrived:

    start = max(resources free, end of each need + lag of its link)

While actions run, the machine says how fast (`Machine.rates`); the clock goes from event to event. Where every rank
owns its device nothing ever changes a rate, and one pass in the schedule's order gives the same times.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import compress, repeat
from math import inf
from operator import mul, sub, truediv

from megatron_mosaic.cost_model.machine import Machine, OwnDevices
from megatron_mosaic.cost_model.program import Program

Times = tuple[list[float], list[float]]  # starts and ends, by position

_SOON_S = 1e-12  # what rounding leaves of work, or of a way, is none


def run_clock(program: Program, job_s: Sequence[float], lag_s: Sequence[float], machine: Machine) -> Times:
    """`job_s` by `program.jobs`, at rate 1; `lag_s` by `program.links`, of which the first is 0."""
    if not isinstance(machine, OwnDevices):
        return run_events(program, job_s, lag_s, machine)
    if max(map(len, program.resources)) == 1:
        return _run_lanes(program, job_s, lag_s)
    return _run_order(program, job_s, lag_s)


def _run_lanes(program: Program, job_s: Sequence[float], lag_s: Sequence[float]) -> Times:
    """One pass, where a lane occupies one resource."""
    free = [0.0] * program.num_resources
    resource = [held[0] for held in program.resources]
    starts: list[float] = []
    ends = [0.0]  # of no need
    for lane, job, need, link, more in zip(program.lane, program.job, program.need, program.link, program.more_needs):
        held = resource[lane]
        start = free[held]
        arrival = ends[need] + lag_s[link]
        if arrival > start:
            start = arrival
        if more:
            start = max(start, *[ends[other] + lag_s[way] for other, way in more])
        free[held] = end = start + job_s[job]
        starts.append(start)
        ends.append(end)
    return starts, ends[1:]


def _run_order(program: Program, job_s: Sequence[float], lag_s: Sequence[float]) -> Times:
    """One pass, where a lane may occupy several resources."""
    free = [0.0] * program.num_resources
    starts: list[float] = []
    ends = [0.0]
    for lane, job, need, link, more in zip(program.lane, program.job, program.need, program.link, program.more_needs):
        held = program.resources[lane]
        start = ends[need] + lag_s[link]
        for each in held:
            if free[each] > start:
                start = free[each]
        if more:
            start = max(start, *[ends[other] + lag_s[way] for other, way in more])
        end = start + job_s[job]
        for each in held:
            free[each] = end
        starts.append(start)
        ends.append(end)
    return starts, ends[1:]


def run_events(program: Program, job_s: Sequence[float], lag_s: Sequence[float], machine: Machine) -> Times:
    """From event to event, whatever the machine does to rates."""
    return _Events(program, lag_s).run(job_s, machine)


class _Events:
    """What waits for what: each resource's actions still to run, actions that sleep until a need ends, and actions
    whose inputs are under way. All three shrink as the clock goes on."""

    def __init__(self, program: Program, lag_s: Sequence[float]) -> None:
        self.program, self.lag_s = program, lag_s
        self.queues: list[list[int]] = [[] for _ in range(program.num_resources)]  # the next one last
        for position in reversed(range(len(program.lane))):
            for each in program.resources[program.lane[position]]:
                self.queues[each].append(position)
        self.starts = [-1.0] * len(program.lane)
        self.ends = [0.0] + [-1.0] * len(program.lane)  # by need: 1 + position
        self.sleepers: dict[int, list[int]] = {}  # need -> positions that look again when it ends
        self.under_way: list[tuple[float, int]] = []  # heap of (arrival, position)

    def run(self, job_s: Sequence[float], machine: Machine) -> Times:
        """Starts and ends. An event is an action's end or an input's arrival."""
        active: list[int] = []  # positions at work, with their lanes and the seconds of work left of each, at rate 1
        lanes: list[int] = []
        left: list[float] = []
        lane_of, job_of, now = self.program.lane, self.program.job, 0.0
        self._look([queue[-1] for queue in self.queues])
        while active or self.under_way:
            for position in self._arrived(now):
                self.starts[position] = now
                active.append(position)
                lanes.append(lane_of[position])
                left.append(job_s[job_of[position]])
            rates = machine.rates(lanes)
            step = min(map(truediv, left, rates), default=inf)
            if self.under_way:
                step = min(step, self.under_way[0][0] - now)
            now += step
            left = list(map(sub, left, map(mul, rates, repeat(step))))
            if left and min(left) <= _SOON_S:
                done = [position for position, work in zip(active, left) if work <= _SOON_S]
                keep = [work > _SOON_S for work in left]
                active, lanes = list(compress(active, keep)), list(compress(lanes, keep))
                left = list(compress(left, keep))
                self._look(self._finish(done, now))
        return self.starts, self.ends[1:]

    def _finish(self, done: list[int], now: float) -> list[int]:
        """The actions that may have waited for these alone."""
        found: list[int] = []
        for position in done:
            self.ends[1 + position] = now
            for each in self.program.resources[self.program.lane[position]]:
                queue = self.queues[each]
                queue.pop()
                found += queue[-1:]
            found += self.sleepers.pop(1 + position, ())
        return found

    def _look(self, positions: list[int]) -> None:
        """Send the inputs of those on their way that are next everywhere and whose needs have ended."""
        ends, lag_s, program = self.ends, self.lag_s, self.program
        for position in dict.fromkeys(positions):
            held = program.resources[program.lane[position]]
            if any([self.queues[each][-1] != position for each in held]):
                continue  # it looks again when it is the next one there
            needs = ((program.need[position], program.link[position]), *program.more_needs[position])
            waits = [need for need, _ in needs if ends[need] < 0]
            if waits:
                self.sleepers.setdefault(waits[0], []).append(position)
            else:
                heapq.heappush(self.under_way, (max([ends[need] + lag_s[link] for need, link in needs]), position))

    def _arrived(self, now: float) -> list[int]:
        """Actions whose inputs are there: they start."""
        found = []
        while self.under_way and self.under_way[0][0] <= now + _SOON_S:
            found.append(heapq.heappop(self.under_way)[1])
        return found
