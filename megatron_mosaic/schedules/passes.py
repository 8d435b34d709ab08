"""Lanes that share a rank take turns: the merge of all lanes into one order, and each rank's part of it.

Every rank runs its actions in the order of one global list, so collectives of different modules meet in the same
order everywhere and sends never block: no deadlock, whatever overlaps, as long as messages of different modules have
communicators of their own. Simulator and executor both call this.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules.schedule import Action, Kind, Schedule

_WEIGHT = {Kind.F: 1, Kind.B: 2, Kind.I: 1, Kind.W: 1}


def stage_ranks(plan: Plan, module: str, stage: int) -> tuple[int, ...]:
    """Global ranks of one pipeline stage, in layout order (pp is the slowest axis)."""
    ranks = plan.modules[module].ranks.ranks
    size = len(ranks) // plan.modules[module].layout.pp
    return ranks[stage * size : (stage + 1) * size]


def merge_lanes(plan: Plan, schedule: Schedule) -> tuple[Action, ...]:
    """One global order: list scheduling in nominal time (F 1, B 2) where a rank runs one action at a time.

    Picks the action that can start first; on ties a backward before a forward, then the lane listed first.
    """
    return order_actions(schedule, rank_classes(plan))


def rank_classes(plan: Plan) -> Mapping[str, frozenset[int]]:
    """Lane -> the classes of ranks it runs on. Ranks with the same lanes are one class, named by its lowest rank."""
    return _rank_classes(tuple((name, placed.ranks.ranks, placed.layout.pp) for name, placed in plan.modules.items()))


@lru_cache(maxsize=4096)
def _rank_classes(modules: tuple[tuple[str, tuple[int, ...], int], ...]) -> Mapping[str, frozenset[int]]:
    lanes_of: dict[int, tuple[str, ...]] = {}
    for module, ranks, num_stages in modules:
        size = len(ranks) // num_stages
        for index, rank in enumerate(ranks):
            lanes_of[rank] = (*lanes_of.get(rank, ()), f"{module}.{index // size}")
    first: dict[tuple[str, ...], int] = {}
    for rank in sorted(lanes_of):
        first.setdefault(lanes_of[rank], rank)
    classes: dict[str, set[int]] = {}
    for lanes, rank in first.items():
        for lane in lanes:
            classes.setdefault(lane, set()).add(rank)
    return {lane: frozenset(members) for lane, members in classes.items()}


def order_actions(schedule: Schedule, classes: Mapping[str, frozenset[int]]) -> tuple[Action, ...]:
    """The global order of `merge_lanes`; `classes[lane]` names what a lane occupies while it runs."""
    free = dict.fromkeys((name for members in classes.values() for name in members), 0)
    end: dict[Action, int] = {}
    cursor = dict.fromkeys(schedule.lanes, 0)
    index = {lane: i for i, lane in enumerate(schedule.lanes)}
    waiting = {lane: schedule.needs(actions[0]) for lane, actions in schedule.lanes.items() if actions}
    ready: dict[str, int] = {}  # lane -> when the needs of its next action are done
    while waiting or ready:
        for lane in [lane for lane, needs in waiting.items() if all(need in end for need in needs)]:
            ready[lane] = max([end[need] for need in waiting.pop(lane)], default=0)
        assert ready  # the Schedule's constructor refused deadlocks
        (start, _, _), lane = min(
            (
                (
                    max(ready_at, max([free[name] for name in classes[lane]])),
                    schedule.lanes[lane][cursor[lane]].kind is Kind.F,
                    index[lane],
                ),
                lane,
            )
            for lane, ready_at in ready.items()
        )
        action = schedule.lanes[lane][cursor[lane]]
        end[action] = start + _WEIGHT[action.kind]
        for name in classes[lane]:
            free[name] = end[action]
        cursor[lane] += 1
        del ready[lane]
        if cursor[lane] < len(schedule.lanes[lane]):
            waiting[lane] = schedule.needs(schedule.lanes[lane][cursor[lane]])
    return tuple(end)


def rank_programs(plan: Plan, schedule: Schedule) -> dict[int, tuple[Action, ...]]:
    """Rank -> its actions, in order. Ranks without a lane have an empty program."""
    programs: dict[int, list[Action]] = {rank: [] for rank in range(plan.world_size)}
    for action in merge_lanes(plan, schedule):
        for rank in stage_ranks(plan, action.module, action.stage):
            programs[rank].append(action)
    return {rank: tuple(actions) for rank, actions in programs.items()}
