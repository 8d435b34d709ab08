"""Who talks to whom, by what the time of a collective depends on: how many ranks, on how many nodes, how evenly.

Rank sets are spans, so a group of 10,000 ranks is worked out once and kept as three integers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_mosaic.plan import Layout, RankSet


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of one collective. `fewest`: of them on the node that has fewest."""

    size: int
    nodes: int
    fewest: int

    @classmethod
    def on_one_node(cls, size: int) -> Group:
        return cls(size, 1, size)

    @classmethod
    def of(cls, ranks: RankSet, gpus_per_node: int, positions: range | None = None) -> Group:
        """All ranks, or those at `positions` (ascending)."""
        chosen, on_node, position = positions or range(len(ranks)), Counter[int](), 0
        for first, end in ranks.spans:
            low = max(chosen.start, position)
            low += (chosen.start - low) % chosen.step
            stop = min(end, first + chosen.stop - position)
            on_node.update(rank // gpus_per_node for rank in range(first + low - position, stop, chosen.step))
            position += end - first
        return cls(on_node.total(), len(on_node), min(on_node.values()))

    @classmethod
    def pair(cls, one: int, other: int, gpus_per_node: int) -> Group:
        """Two ranks."""
        nodes = 1 if one // gpus_per_node == other // gpus_per_node else 2
        return cls(2, nodes, 2 // nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGroups:
    """Groups of a pipeline stage's ranks: of its first dp slot, and across slots those whose gradients are added."""

    tp: Group
    cp: Group
    ep: Group
    dp: Group  # ranks with the same dense parameters
    expert_dp: Group  # ranks with the same experts


@lru_cache(maxsize=65536)
def stage_groups(ranks: RankSet, layout: Layout, gpus_per_node: int) -> StageGroups:
    """Groups of a stage on these ranks, laid out as `Layout` says."""
    tp, cp, experts, size = layout.tp, layout.cp, layout.ep * layout.etp, len(ranks)

    def at(*positions: int) -> Group:
        return Group.of(ranks, gpus_per_node, range(*positions))

    return StageGroups(
        tp=_worst_group(ranks, tp, gpus_per_node),
        cp=at(0, tp * cp, tp),
        ep=at(0, experts, 1),
        dp=at(0, size, tp),
        expert_dp=at(0, size, min(size, experts)),
    )


def _worst_group(ranks: RankSet, size: int, gpus_per_node: int) -> Group:
    """Of consecutive groups of this size: the first that crosses nodes, else the first."""
    if gpus_per_node % size == 0 and not any(first % size or end % size for first, end in ranks.spans):
        return Group.on_one_node(size)
    for start in range(0, len(ranks), size):
        group = Group.of(ranks, gpus_per_node, range(start, start + size))
        if group.nodes > 1:
            return group
    return Group.on_one_node(size)
