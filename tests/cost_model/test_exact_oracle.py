"""The clock equals the discrete-event oracle to the last bit, on random orders that no builder would make.

Durations and lags are whole numbers, so that floats add them without rounding."""

import random
from collections.abc import Mapping

import pytest

from megatron_mosaic.cost_model.clock import run as clock
from megatron_mosaic.cost_model.clock.machine import OwnDevices
from megatron_mosaic.cost_model.clock.program import Program, fold
from megatron_mosaic.cost_model.clock.replicas import Replicas
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.schedules import Action, Schedule, build_schedule
from megatron_mosaic.schedules.lane_work import LaneWork
from tests.cases import WORKLOAD
from tests.cost_model.oracle_events import run_oracle

WORLD_SIZE = 8


def draw_plan(rng: random.Random) -> Plan:
    """Three modules anywhere on 8 ranks, in any layout that fits there, with units of their own."""
    modules = {}
    for module in WORKLOAD.modules:
        tp, pp, dp = rng.choice([(1, 1, n) for n in (1, 2, 3, 4, 6, 8)] + [(2, 1, 2), (2, 2, 1), (1, 2, 3), (1, 4, 2)])
        ranks = RankSet.of(rng.sample(range(WORLD_SIZE), tp * pp * dp))
        unit = 1 if module.name == "llm" else rng.choice([1, 1, 2, 3])
        modules[module.name] = ModulePlan(ranks=ranks, layout=Layout(tp=tp, pp=pp, dp=dp), unit=unit)
    microbatches = rng.randint(1, 5)
    return Plan(
        workload=WORKLOAD.name,
        digest=WORKLOAD.digest,
        world_size=WORLD_SIZE,
        global_batch_size=microbatches * modules["llm"].layout.dp,
        micro_batch_size=1,
        schedule=ScheduleChoice(rng.choice(["three_phase", "nested"])),
        modules=modules,
    )


def shuffle(schedule: Schedule, rng: random.Random) -> Schedule:
    """The same actions in a random order that puts needs first, on random tracks."""
    missing = {action: len(set(schedule.needs(action))) for action in schedule.order}
    waiting: dict[Action, list[Action]] = {}
    for action in schedule.order:
        for need in set(schedule.needs(action)):
            waiting.setdefault(need, []).append(action)
    ready, order = [action for action, count in missing.items() if not count], []
    while ready:
        order.append(ready.pop(rng.randrange(len(ready))))
        for action in waiting.get(order[-1], ()):
            missing[action] -= 1
            if not missing[action]:
                ready.append(action)
    lanes = {lane: tuple(action for action in order if action.lane == lane) for lane in schedule.lanes}
    work = LaneWork(
        num_microbatches=schedule.num_microbatches, edges=schedule.work.edges, units=schedule.work.units, lanes=lanes
    )
    return Schedule(name="random", work=work, order=tuple(order), tracks={lane: rng.randint(0, 2) for lane in lanes})


def run_exactly(
    program: Program, names: list[str], replicas: Replicas, action_s: Mapping, lag_s: Mapping
) -> dict[tuple[int, Action], tuple[float, float]]:
    """Rank and action -> start and end, by the clock."""
    job_s = [action_s[names[lane], kind] for lane, kind in program.jobs]
    lags = [0.0] + [lag_s[names[since], names[to]] for since, to in program.links[1:]]
    starts, ends = clock.run_clock(program, job_s, lags, OwnDevices())
    return {
        (rank, program.schedule.order[at]): (start, end)
        for at, slots, start, end in zip(program.entry, program.slots, starts, ends)
        for kind in replicas.kinds
        if slots in kind.slot_classes
        for rank in kind.ranks
    }


def assert_exact(seed: int) -> int:
    """One random schedule; the number of its spans."""
    rng = random.Random(seed)
    plan = draw_plan(rng)
    work = list_stage_work(plan, WORKLOAD, WORLD_SIZE)
    schedule = shuffle(build_schedule(plan, WORKLOAD), rng)
    program = fold(schedule, work.graph, work.replicas.classes)
    names = [lane.name for lane in work.lanes]
    action_s = {(name, kind): float(rng.randint(1, 9)) for name in names for kind in ("F", "B")}
    lag_s = {(a, b): float(rng.choice([0, 0, 1, 5])) for a in names for b in names}
    found = run_exactly(program, names, work.replicas, action_s, lag_s)
    expected = run_oracle(
        plan, schedule, seconds=lambda a: action_s[a.lane, a.kind], lag_s=lambda since, to: lag_s[since, to]
    )
    assert found == expected, f"seed {seed}"
    return len(found)


def test_random_schedules_are_exactly_as_in_the_oracle():
    assert sum(map(assert_exact, range(60))) > 1000


@pytest.mark.slow
def test_a_thousand_random_schedules_are_exactly_as_in_the_oracle():
    assert sum(map(assert_exact, range(1000))) > 30_000


def test_a_lag_that_the_clock_forgets_is_found(monkeypatch):
    exact = clock.run_clock

    def without_lags(program, job_s, lag_s, machine):
        return exact(program, job_s, [0.0] * len(lag_s), machine)

    monkeypatch.setattr(clock, "run_clock", without_lags)
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(20):
            assert_exact(seed)
