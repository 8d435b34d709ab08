"""Who talks to whom, by what the time of a collective depends on: how many ranks, on how many nodes, how evenly.

Rank sets are spans, so a group of 10,000 ranks is worked out once and kept as three integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

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
        chosen, position = positions or range(len(ranks)), 0
        if ranks.first // gpus_per_node == ranks.last // gpus_per_node:
            return cls.on_one_node(len(chosen))
        on_node = np.zeros(ranks.last // gpus_per_node + 1, dtype=np.int64)
        for first, end in ranks.spans:
            low = max(chosen.start, position)
            low += (chosen.start - low) % chosen.step
            stop = min(end, first + chosen.stop - position)
            _count_on_nodes(range(first + low - position, stop, chosen.step), gpus_per_node, on_node)
            position += end - first
        used = on_node[on_node > 0]
        return cls(int(used.sum()), len(used), int(used.min()))

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


def _count_on_nodes(ranks: range, gpus_per_node: int, on_node: NDArray[np.int64]) -> None:
    """Adds to each node how many of these ranks are there: as many as lie below its end, and not below its start."""
    if not ranks:
        return
    begin, end = ranks[0] // gpus_per_node, ranks[-1] // gpus_per_node + 1
    if end - begin == 1:
        on_node[begin] += len(ranks)
        return
    borders = np.arange(begin + 1, end, dtype=np.int64) * gpus_per_node
    below = -((ranks.start - borders) // ranks.step)
    on_node[begin:end] += np.diff(below, prepend=0, append=len(ranks))


def _worst_group(ranks: RankSet, size: int, gpus_per_node: int) -> Group:
    """Of consecutive groups of this size: the first that crosses nodes, else the first."""
    if gpus_per_node % size == 0 and not any(first % size or end % size for first, end in ranks.spans):
        return Group.on_one_node(size)
    for start in range(0, len(ranks), size):
        group = Group.of(ranks, gpus_per_node, range(start, start + size))
        if group.nodes > 1:
            return group
    return Group.on_one_node(size)
