"""An independent discrete-event simulation (simpy) of a schedule, rank by rank: nothing is folded, nothing is ordered
ahead. What the clock is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import pytest
import simpy

from megatron_mosaic.cost_model.clock.replicas import Replicas
from megatron_mosaic.cost_model.effects.interference import CoRunner, Interference
from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.plan import Layout, Plan
from megatron_mosaic.schedules import Action, Schedule
from megatron_mosaic.schedules.passes import project, stage_ranks

Slot = tuple[int, ...]  # ranks of one replica of a stage
Lags = Callable[[str, str], float]  # from a lane to one that needs its results


def times_of(simulation: Simulation) -> tuple[list[float], list[float]]:
    """Seconds by job and by link of its program, as the clock takes them."""
    price, program = simulation.price, simulation.program
    job_s = [price.costs[lane].seconds(kind) for lane, kind in program.jobs]
    return job_s, [0.0] + [price.transfer_s(*link) for link in program.links[1:]]


def assert_as_in_the_oracle(simulation: Simulation, plan: Plan, cores: int = 0) -> None:
    """Every action starts and ends on every rank when it does with each rank a process of its own. `cores` 0: ranks
    share none."""
    price, schedule = simulation.price, simulation.program.schedule
    number = {lane.name: i for i, lane in enumerate(price.work.lanes)}

    def runner(action: Action) -> CoRunner:
        return price.runner(number[action.lane], action.kind)

    expected = run_oracle(
        plan,
        schedule,
        seconds=lambda action: price.costs[number[action.lane]].seconds(action.kind),
        lag_s=lambda source, target: price.transfer_s(number[source], number[target]),
        rank_threads={name: price.costs[i].threads // len(price.work.lanes[i].ranks) for name, i in number.items()},
        cores=cores,
        contention=Contention(price.source.interference, runner) if any(simulation.program.beside) else None,
    )
    found = by_rank(simulation, price.work.replicas)
    assert found.keys() == expected.keys()
    for key, times in found.items():
        assert times == pytest.approx([price.data_s + at for at in expected[key]], rel=1e-6, abs=1e-9), str(key)


def by_rank(simulation: Simulation, replicas: Replicas) -> dict[tuple[int, Action], tuple[float, float]]:
    """Rank and action -> start and end, as a simulation says."""
    program = simulation.program
    ranks = [[r for kind in replicas.kinds if each in kind.slot_classes for r in kind.ranks] for each in
             range(len(program.resources))]  # fmt: skip
    rows = zip(program.entry, program.slots, simulation.start_s, simulation.end_s)
    order = program.schedule.order
    return {(rank, order[at]): (start, end) for at, slots, start, end in rows for rank in ranks[slots]}


@lru_cache(maxsize=256)
def find_slots(plan: Plan, module: str, stage: int) -> list[Slot]:
    """Ranks that start together: of one dp slot, and of all that share a group of experts; as sets grow together."""
    ranks, layout = stage_ranks(plan, module, stage), plan.modules[module].layout
    groups = [{*range(i, i + size)} for size in _group_sizes(layout) for i in range(0, len(ranks), size)]
    joined: list[set[int]] = []
    for group in groups:
        touching = [other for other in joined if other & group]
        joined = [other for other in joined if not other & group] + [group.union(*touching)]
    return [tuple(ranks[i] for i in sorted(group)) for group in sorted(joined, key=min)]


def _group_sizes(layout: Layout) -> tuple[int, int]:
    return layout.tp * layout.cp, layout.ep * layout.etp


def find_hand_over(plan: Plan, source: str, target: str) -> set[tuple[int, int]]:
    """Slots of two lanes that share items: those on the same ranks where each side's slots get an even share of what
    the other's share out evenly, else those whose shares of a unit's items, cut in order, overlap."""
    own, opposite = (find_slots(plan, *split_lane(lane)) for lane in (source, target))
    modules = [split_lane(lane)[0] for lane in (source, target)]
    if modules[0] == modules[1]:
        return {(i, i) for i in range(len(own))}
    ranks_of = [
        [{r for stage in range(plan.modules[m].layout.pp) for r in find_slots(plan, m, stage)[i]} for i in range(count)]
        for m, count in zip(modules, (len(own), len(opposite)))
    ]
    shared = {(i, j) for i, a in enumerate(ranks_of[0]) for j, b in enumerate(ranks_of[1]) if a & b}
    back = {(j, i) for i, j in shared}
    if _even(shared, len(own), len(opposite)) and _even(back, len(opposite), len(own)):
        return shared
    return {(i, j) for i in range(len(own)) for j in range(len(opposite)) if _overlap(i, len(own), j, len(opposite))}


def _even(pairs: set[tuple[int, int]], count: int, opposite: int) -> bool:
    degree = Counter(a for a, _ in pairs)
    loads = dict.fromkeys(range(opposite), Fraction(0))
    for a, b in pairs:
        loads[b] += Fraction(1, degree[a])
    return len(degree) == count and {*loads.values()} == {Fraction(count, opposite)}


def _overlap(i: int, count: int, j: int, opposite: int) -> bool:
    low = max(Fraction(i, count), Fraction(j, opposite))
    return low < min(Fraction(i + 1, count), Fraction(j + 1, opposite))


def share_microbatches(
    plan: Plan, schedule: Schedule, one: tuple[Action, int, int], other: tuple[Action, int, int]
) -> bool:
    """Whether (action, slot, of so many) have items of the same microbatches. With replicas of the backbone, items stay
    with their owners' slots, of whatever microbatch they are."""
    modules = {one[0].module, other[0].module}
    if plan.modules["llm"].layout.dp > 1 or len(modules) == 1 or "llm" not in modules:
        return True
    (low, high), (first, stop) = (_part_of_unit(schedule, *each) for each in (one, other))
    return max(low, first) < min(high, stop)


def _part_of_unit(schedule: Schedule, action: Action, i: int, count: int) -> tuple[Fraction, Fraction]:
    """From and to which microbatch: the i-th of equal parts of what the module does at once."""
    size = schedule.work.units[action.module]
    first, stop = action.unit * size, min((action.unit + 1) * size, schedule.num_microbatches)
    length = Fraction(stop - first, count)
    return first + i * length, first + (i + 1) * length


@dataclass(frozen=True)
class Contention:
    """What tracks of one rank share, and what an action asks of it."""

    constants: Interference
    runner: Callable[[Action], CoRunner]

    def slow_downs(self, actions: Sequence[Action], speed: float) -> list[float]:
        """Of actions on one rank: all get what they ask for, up to a level at which nothing is left."""
        made, runners = self.constants, [self.runner(action) for action in actions]
        capacity = made.bandwidth_bytes_per_s
        in_cache = [min(1.0, made.cache_bytes / each.footprint_bytes) for each in runners]
        reach = [(1 - part) * each.moved_bytes / each.alone_s for part, each in zip(in_cache, runners)]
        asked = [speed * min(each, capacity) for each in reach]
        launch = [speed * min(1.0, made.serial_frac * each.host_s / each.alone_s) for each in runners]
        level, launch_level = _level(asked, capacity), _level(launch, 1.0)
        moved = [min(each, level) for each in asked]
        found = []
        for i in range(len(actions)):
            others = sum(moved[:i] + moved[i + 1 :]) / capacity
            memory = (asked[i] / moved[i] if moved[i] else 1) * (1 + made.residual * others)
            found.append(max(memory, launch[i] / min(launch[i], launch_level) if launch[i] else 1))
        return found


def _level(asked: Sequence[float], capacity: float) -> float:
    """The largest share that anybody gets, by bisection."""
    if sum(asked) <= capacity:
        return float("inf")
    low, high = 0.0, max(asked)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(each, middle) for each in asked) <= capacity else (low, middle)
    return low


@dataclass
class _Job:
    work: float
    threads: int
    action: Action
    ranks: Slot


@dataclass
class _Cores:
    """Processor sharing as a simpy process: jobs advance at min(1, cores / threads at work), slowed down by those on
    their ranks. `cores` 0: ranks share none."""

    env: simpy.Environment
    cores: int
    contention: Contention | None

    def __post_init__(self) -> None:
        self.jobs: dict[simpy.Event, _Job] = {}  # by what succeeds when they are done
        self.since = 0.0  # when the work left was true
        self.changed = self.env.event()
        self.env.process(self._serve())

    def run(self, job: _Job) -> simpy.Event:
        self._advance()
        finished = self.env.event()
        self.jobs[finished] = job
        self.changed.succeed()
        self.changed = self.env.event()
        return finished

    def _rates(self) -> list[tuple[_Job, float]]:
        jobs = list(self.jobs.values())
        at_work = sum(job.threads for job in jobs)
        speed = min(1.0, self.cores / at_work) if self.cores and at_work else 1.0
        slow = [1.0] * len(jobs)
        for rank in {rank for job in jobs for rank in job.ranks} if self.contention else ():
            here = [i for i, job in enumerate(jobs) if rank in job.ranks]
            if len(here) > 1:
                for i, factor in zip(here, self.contention.slow_downs([jobs[i].action for i in here], speed)):
                    slow[i] = max(slow[i], factor)
        return [(job, speed / factor) for job, factor in zip(jobs, slow)]

    def _advance(self) -> None:
        for job, rate in self._rates():
            job.work -= (self.env.now - self.since) * rate
        self.since = self.env.now

    def _serve(self):
        while True:
            soonest = min((max(0.0, job.work) / rate for job, rate in self._rates()), default=float("inf"))
            yield self.changed | self.env.timeout(soonest) if self.jobs else self.changed
            self._advance()
            for finished, job in list(self.jobs.items()):
                if job.work < 1e-12:
                    del self.jobs[finished]
                    finished.succeed()


def run_oracle(
    plan: Plan,
    schedule: Schedule,
    *,
    seconds: Callable[[Action], float],
    lag_s: Lags,
    rank_threads: Mapping[str, int] | None = None,
    cores: int = 0,
    contention: Contention | None = None,
) -> dict[tuple[int, Action], tuple[float, float]]:
    """(rank, action) -> start and end. Every track of every rank is a process that works through its program; the ranks
    of a slot meet, wait for their inputs from the slots opposite, then run together."""
    env = simpy.Environment()
    machine = _Cores(env, cores, contention)
    slots = {lane: find_slots(plan, *split_lane(lane)) for lane in schedule.lanes}
    keys = [(action, i) for action in schedule.order for i in range(len(slots[action.lane]))]
    done = {key: env.event() for key in keys}
    meeting = {key: simpy.Container(env, init=0) for key in keys}
    times: dict[tuple[int, Action], tuple[float, float]] = {}

    handed: dict[tuple[str, str], set[tuple[int, int]]] = {}

    def meets(source: str, i: int, target: str, j: int) -> bool:
        if (source, target) not in handed:
            handed[source, target] = find_hand_over(plan, source, target)
        return (i, j) in handed[source, target]

    def needed(need: Action, i: int, action: Action):
        yield done[need, i]
        if need.lane != action.lane:
            yield env.timeout(lag_s(need.lane, action.lane))

    def act(action: Action, i: int):
        ranks, own = slots[action.lane][i], (action, i, len(slots[action.lane]))
        inputs = [
            env.process(needed(need, j, action))
            for need in schedule.needs(action)
            for j in range(len(slots[need.lane]))
            if meets(need.lane, j, action.lane, i)
            and share_microbatches(plan, schedule, (need, j, len(slots[need.lane])), own)
        ]
        yield env.all_of([meeting[action, i].get(len(ranks)), *inputs])
        start = env.now
        if cores or contention:
            threads = rank_threads[action.lane] * len(ranks) if cores else 0
            yield machine.run(_Job(seconds(action), threads, action, ranks))
        else:
            yield env.timeout(seconds(action))
        for rank in ranks:
            times[rank, action] = start, env.now
        done[action, i].succeed()

    def track_process(rank: int, program: Sequence[Action]):
        for action in program:
            key = action, next(i for i, ranks in enumerate(slots[action.lane]) if rank in ranks)
            yield meeting[key].put(1)
            yield done[key]

    for key in keys:
        env.process(act(*key))
    lanes_of: dict[tuple[int, int], list[str]] = {}  # rank and track -> lanes
    for lane, found in slots.items():
        for rank in [rank for ranks in found for rank in ranks]:
            lanes_of.setdefault((rank, schedule.tracks[lane]), []).append(lane)
    for (rank, _), lanes in lanes_of.items():
        env.process(track_process(rank, project(schedule, lanes)))
    env.run(until=env.all_of(list(done.values())))
    return times


def split_lane(lane: str) -> tuple[str, int]:
    module, _, stage = lane.rpartition(".")
    return module, int(stage)
