"""Ranks that run the same lanes do the same at the same time: they are one class. Worked out on spans of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_mosaic.plan import Plan, RankSet


@dataclass(frozen=True, slots=True, kw_only=True)
class RankClass:
    """Ranks with the same lanes, and these lanes in the plan's order."""

    ranks: RankSet
    lanes: tuple[str, ...]


def rank_classes(plan: Plan) -> tuple[RankClass, ...]:
    """Every rank with a lane is in one class; classes by their lowest rank."""
    return _rank_classes(tuple((name, placed.ranks, placed.layout.pp) for name, placed in plan.modules.items()))


@lru_cache(maxsize=4096)
def _rank_classes(modules: tuple[tuple[str, RankSet, int], ...]) -> tuple[RankClass, ...]:
    """A sweep over the ends of all spans: between two of them, every rank has the same lanes."""
    changes: dict[int, list[tuple[int, bool]]] = {}  # rank -> (lane that begins or ends there, begins)
    lanes: list[str] = []
    for module, ranks, num_stages in modules:
        size = len(ranks) // num_stages
        for stage in range(num_stages):
            for first, stop in ranks.part(stage * size, (stage + 1) * size).spans:
                changes.setdefault(first, []).append((len(lanes), True))
                changes.setdefault(stop, []).append((len(lanes), False))
            lanes.append(f"{module}.{stage}")
    spans: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    running: set[int] = set()
    begin = 0
    for rank in sorted(changes):
        if running:
            spans.setdefault(tuple(sorted(running)), []).append((begin, rank))
        for lane, begins in changes[rank]:
            (running.add if begins else running.discard)(lane)
        begin = rank
    return tuple(
        RankClass(ranks=RankSet.joined(found), lanes=tuple(lanes[number] for number in numbers))
        for numbers, found in sorted(spans.items(), key=lambda pair: pair[1][0])
    )


def classes_of_lanes(classes: tuple[RankClass, ...]) -> Mapping[str, frozenset[int]]:
    """Lane -> numbers of the classes that run it."""
    found: dict[str, set[int]] = {}
    for number, alike in enumerate(classes):
        for lane in alike.lanes:
            found.setdefault(lane, set()).add(number)
    return {lane: frozenset(numbers) for lane, numbers in found.items()}
