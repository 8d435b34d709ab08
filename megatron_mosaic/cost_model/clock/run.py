"""The one clock: when each action of a program starts and ends.

A row of the program is an action of one class of dp slots: it occupies their resources, and starts when these are free
and its inputs have arrived:

    start = max(resources free, end of each need + lag of its link)

While actions run, the machine says how fast (`Machine.rates`); the clock goes from event to event, an event being an
action's end or an input's arrival. Where every rank owns its device nothing ever changes a rate, and one pass in the
schedule's order gives the same times; on shared cores all rates are equal, and one heap says who ends next. Tracks
beside each other slow each other down, each in its own way: there the machine is asked at every event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import compress, repeat
from math import inf
from operator import mul, sub, truediv

from megatron_mosaic.cost_model.clock.machine import Machine, OwnDevices, SharedCores
from megatron_mosaic.cost_model.clock.program import Program

Times = tuple[list[float], list[float]]  # starts and ends, by row

_SOON_S = 1e-12  # what rounding leaves of work, or of a way, is none


def run_clock(program: Program, job_s: Sequence[float], lag_s: Sequence[float], machine: Machine) -> Times:
    """`job_s` by `program.jobs`, at rate 1; `lag_s` by `program.links`, of which the first is 0."""
    if isinstance(machine, SharedCores):
        return _run_equal_rates(program, job_s, lag_s, machine)
    if not isinstance(machine, OwnDevices):
        return run_events(program, job_s, lag_s, machine)
    if max(map(len, program.resources)) == 1:
        return _run_lanes(program, job_s, lag_s)
    return _run_order(program, job_s, lag_s)


def _run_lanes(program: Program, job_s: Sequence[float], lag_s: Sequence[float]) -> Times:
    """One pass, where slots occupy one resource."""
    free = [0.0] * program.num_resources
    resource = [held[0] for held in program.resources]
    starts: list[float] = []
    ends = [0.0]  # of no need
    for slots, job, need, link, more in zip(program.slots, program.job, program.need, program.link, program.more_needs):
        held = resource[slots]
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
    """One pass, where slots may occupy several resources."""
    free = [0.0] * program.num_resources
    starts: list[float] = []
    ends = [0.0]
    for slots, job, need, link, more in zip(program.slots, program.job, program.need, program.link, program.more_needs):
        held = program.resources[slots]
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
    waits, now = _Waits(program, lag_s), 0.0
    active: list[int] = []  # rows at work, with their slots, jobs and the seconds of work left of each, at rate 1
    slots: list[int] = []
    jobs: list[int] = []
    left: list[float] = []
    while active or waits.under_way:
        for row in waits.arrived(now):
            active.append(row)
            slots.append(program.slots[row])
            jobs.append(program.job[row])
            left.append(job_s[program.job[row]])
        rates = machine.rates(slots, jobs)
        step = min(map(truediv, left, rates), default=inf)
        if waits.under_way:
            step = min(step, waits.under_way[0][0] - now)
        now += step
        left = list(map(sub, left, map(mul, rates, repeat(step))))
        if left and min(left) <= _SOON_S:
            for row in [row for row, work in zip(active, left) if work <= _SOON_S]:
                waits.finish(row, now)
            keep = [work > _SOON_S for work in left]
            active, slots = list(compress(active, keep)), list(compress(slots, keep))
            jobs, left = list(compress(jobs, keep)), list(compress(left, keep))
    return waits.starts, waits.ends


class _Waits:
    """Who waits for how many ends, and whose inputs are under way. A row waits for its needs, and for the row before it
    on each of its resources."""

    def __init__(self, program: Program, lag_s: Sequence[float]) -> None:
        self.followers = _Followers(program, lag_s)
        self.count = self.followers.count
        self.arrival = [0.0] * len(self.count)  # of the latest input so far
        self.starts, self.ends = [-1.0] * len(self.count), [-1.0] * len(self.count)
        self.under_way = [(0.0, row) for row, count in enumerate(self.count) if not count]  # heap of (arrival, row)

    def finish(self, row: int, now: float) -> None:
        """It has ended: its results are on their way."""
        self.ends[row] = now
        for waiting, lag in self.followers.of(row):
            self.arrival[waiting] = max(self.arrival[waiting], now + lag)
            self.count[waiting] -= 1
            if not self.count[waiting]:
                heappush(self.under_way, (self.arrival[waiting], waiting))

    def arrived(self, now: float) -> list[int]:
        """Rows whose inputs are there: they start."""
        found = []
        while self.under_way and self.under_way[0][0] <= now + _SOON_S:
            found.append(heappop(self.under_way)[1])
            self.starts[found[-1]] = now
        return found


class _Followers:
    """By row, the rows that wait for it, with the lag of its results: chains in flat lists, `first[row]` and from there
    `following[at]`, -1 at the end. (A list and tuples for each row would have the garbage collector walk through them.)

    `count`: by row, how many ends it waits for: of its needs, and of the row before it on each of its resources.
    """

    def __init__(self, program: Program, lag_s: Sequence[float]) -> None:
        self.first = [-1] * len(program.slots)
        self.row, self.lag_s, self.following = list[int](), list[float](), list[int]()
        self.count: list[int] = []
        latest = [-1] * program.num_resources  # resource -> the row there so far
        resources = program.resources
        rows = zip(program.slots, program.need, program.link, program.more_needs)
        for row, (slots, need, link, more) in enumerate(rows):
            waits, waited = 0, -1
            for each in resources[slots]:
                before = latest[each]
                latest[each] = row
                if before >= 0 and before != waited:
                    waited = before  # a slot's resources most often have the same row before
                    self._add(before, row, 0.0)
                    waits += 1
            if need:
                self._add(need - 1, row, lag_s[link])
                waits += 1
                for other, way in more:
                    self._add(other - 1, row, lag_s[way])
                    waits += 1
            self.count.append(waits)

    def _add(self, row: int, waiting: int, lag_s: float) -> None:
        self.following.append(self.first[row])
        self.first[row] = len(self.row)
        self.row.append(waiting)
        self.lag_s.append(lag_s)

    def of(self, row: int) -> Iterator[tuple[int, float]]:
        """Rows that wait for this one, and lags."""
        at = self.first[row]
        while at >= 0:
            yield self.row[at], self.lag_s[at]
            at = self.following[at]


def _run_equal_rates(program: Program, job_s: Sequence[float], lag_s: Sequence[float], machine: SharedCores) -> Times:
    """From event to event, where all actions at work run at one rate: each gets through the same work in the same time,
    so what has `job_s` to do is done when the work of all has grown by that, and who ends next never changes."""
    followers = _Followers(program, lag_s)
    first, waits_for, following, lag_of, count = (
        followers.first, followers.row, followers.following, followers.lag_s, followers.count
    )  # fmt: skip
    threads = [machine.threads[slots] for slots in program.slots]
    work_s = [job_s[job] for job in program.job]
    starts, ends, arrival = [-1.0] * len(count), [-1.0] * len(count), [0.0] * len(count)
    under_way = [(0.0, row) for row, waits in enumerate(count) if not waits]  # heap of (arrival, row)
    at_work: list[tuple[float, int]] = []  # heap of (done at that much work, row)
    now = work = 0.0
    busy, rate_of = 0, list[float]()  # by threads at work, as far as it was asked for
    while at_work or under_way:
        while busy >= len(rate_of):
            rate_of.append(machine.rate(len(rate_of)))
        rate = rate_of[busy]
        done_s = now + (at_work[0][0] - work) / rate if at_work else inf
        if under_way and under_way[0][0] <= done_s:
            then, row = heappop(under_way)
            work += (then - now) * rate
            now, starts[row] = then, then
            heappush(at_work, (work + work_s[row], row))
            busy += threads[row]
        else:
            work, row = heappop(at_work)
            now = ends[row] = done_s
            busy -= threads[row]
            at = first[row]
            while at >= 0:
                waiting, there = waits_for[at], now + lag_of[at]
                at = following[at]
                if there > arrival[waiting]:
                    arrival[waiting] = there
                count[waiting] = still = count[waiting] - 1
                if still:
                    continue
                if arrival[waiting] > now:
                    heappush(under_way, (arrival[waiting], waiting))
                else:  # nothing is under way to it
                    starts[waiting] = now
                    heappush(at_work, (work + work_s[waiting], waiting))
                    busy += threads[waiting]
    return starts, ends
