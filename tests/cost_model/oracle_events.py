"""An independent discrete-event simulation (simpy) of a schedule, rank by rank: nothing is folded, nothing is ordered
ahead. What the clock is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import simpy

from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules import Action
from megatron_mosaic.schedules.passes import project, stage_ranks


def times_of(simulation: Simulation) -> tuple[list[float], list[float]]:
    """Seconds by job and by link of its program, as the clock takes them."""
    price, program = simulation.price, simulation.program
    job_s = [price.costs[lane].seconds(kind) for lane, kind in program.jobs]
    return job_s, [0.0] + [price.transfer_s(*link) for link in program.links[1:]]


def assert_as_in_the_oracle(simulation: Simulation, plan: Plan, cores: int = 0) -> None:
    """Every action starts and ends when it does with each rank a process of its own. `cores` 0: ranks share none."""
    expected = run_oracle(simulation, plan, cores)
    for position, action in enumerate(simulation.program.schedule.order):
        found = simulation.start_s[position], simulation.end_s[position]
        assert found == pytest.approx(expected[action], rel=1e-6, abs=1e-9), str(action)


@dataclass
class _Cores:
    """Processor sharing as a simpy process: jobs advance at min(1, cores / threads at work)."""

    env: simpy.Environment
    cores: int

    def __post_init__(self) -> None:
        self.jobs: dict[simpy.Event, list[float]] = {}  # finished -> [work left, threads]
        self.since = 0.0  # when the work left was true
        self.changed = self.env.event()
        self.env.process(self._serve())

    def run(self, work: float, threads: int) -> simpy.Event:
        self._advance()
        finished = self.env.event()
        self.jobs[finished] = [work, threads]
        self.changed.succeed()
        self.changed = self.env.event()
        return finished

    @property
    def _rate(self) -> float:
        at_work = sum(threads for _, threads in self.jobs.values())
        return min(1.0, self.cores / at_work) if self.cores and at_work else 1.0

    def _advance(self) -> None:
        worked = (self.env.now - self.since) * self._rate
        self.since = self.env.now
        for job in self.jobs.values():
            job[0] -= worked

    def _serve(self):
        while True:
            soonest = min((max(0.0, work) for work, _ in self.jobs.values()), default=float("inf")) / self._rate
            yield self.changed | self.env.timeout(soonest) if self.jobs else self.changed
            self._advance()
            for finished, (work, _) in list(self.jobs.items()):
                if work < 1e-12:
                    del self.jobs[finished]
                    finished.succeed()


def run_oracle(simulation: Simulation, plan: Plan, cores: int = 0) -> dict[Action, tuple[float, float]]:
    """Action -> start and end. Every track of every rank is a process that works through its program; the ranks of a
    stage meet, wait for their inputs, then run together."""
    price, schedule = simulation.price, simulation.program.schedule
    number = {lane.name: i for i, lane in enumerate(price.work.lanes)}
    env = simpy.Environment()
    machine = _Cores(env, cores)
    done = {action: env.event() for action in schedule.order}
    meeting = {action: simpy.Container(env, init=0) for action in done}
    times: dict[Action, tuple[float, float]] = {}

    def needed(need: Action, action: Action):
        yield done[need]
        if need.lane != action.lane:
            yield env.timeout(price.transfer_s(number[need.lane], number[action.lane]))

    def act(action: Action, num_ranks: int):
        inputs = [env.process(needed(need, action)) for need in schedule.needs(action)]
        yield env.all_of([meeting[action].get(num_ranks), *inputs])
        start, cost = env.now, price.costs[number[action.lane]]
        yield machine.run(cost.seconds(action.kind), cost.threads)
        times[action] = (price.data_s + start, price.data_s + env.now)
        done[action].succeed()

    def track_process(program: Sequence[Action]):
        for action in program:
            yield meeting[action].put(1)
            yield done[action]

    for action in done:
        env.process(act(action, len(stage_ranks(plan, action.module, action.stage))))
    lanes_of: dict[tuple[int, int], list[str]] = {}  # rank and track -> lanes
    for lane in price.work.lanes:
        for rank in lane.ranks:
            lanes_of.setdefault((rank, schedule.tracks[lane.name]), []).append(lane.name)
    for lanes in lanes_of.values():
        env.process(track_process(project(schedule, lanes)))
    env.run(until=env.all_of(list(done.values())))
    return times
