"""Which of its rows a rank sends to whom, and which it gets from whom. Pure integers, computed from local rows alone.

Each side of an edge is cut into *groups*: the ranks of a group are replicas, all holding the same rows; different
groups hold different rows. With plain tensor parallelism a group is a slot's tp ranks; with cp or sequence parallelism
every shard of the tokens is a group of its own.

    source groups           target groups            a rank that is in both keeps its own rows: no message
    0: ranks 0 1        ->  0: rank 2                else replica t of group g reads from source replica (g + t) mod n,
    rows 0 1 2              rows 0 1                 so the traffic spreads over the source's replicas

Every row goes once to every rank that needs it. The way back is the same with the sides swapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.items import Integers
from megatron_mosaic.plan import ModulePlan
from megatron_mosaic.plan.layout import Coordinates, rank_at

Rows = slice | Integers  # positions in a rank's rows; a slice wherever they are consecutive


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows that go to, or come from, one other rank (or the rank itself: no message)."""

    rank: int
    rows: Rows
    num_rows: int


@dataclass(frozen=True, slots=True)
class Side:
    """How one module holds the tokens of a unit, on its first or last stage."""

    placed: ModulePlan
    stage: int
    slot_of_item: Integers
    index_in_slot: Integers
    lengths: Integers  # padded tokens per item, slot by slot

    @property
    def splits_tokens(self) -> bool:
        """Whether the ranks of a slot hold different tokens of its items."""
        return self.placed.layout.cp > 1 or self.placed.sequence_parallel

    def locate(self, items: Integers, tokens: Integers) -> tuple[Integers, Integers]:
        """For each row (item, token): its group, and its token's place in that group's hidden states."""
        layout, group = self.placed.layout, self.slot_of_item[items]
        if not self.splits_tokens:
            return group, tokens
        length, place = self.lengths[group], tokens
        if layout.cp > 1:
            size = length // (2 * layout.cp)
            chunk, within = np.divmod(tokens, size)
            mirrored = chunk >= layout.cp
            group = group * layout.cp + np.where(mirrored, 2 * layout.cp - 1 - chunk, chunk)
            place = within + size * mirrored
        if self.placed.sequence_parallel:
            tp, place = np.divmod(place, length // (layout.cp * layout.tp))
            group = group * layout.tp + tp
        return group, place

    def group_of(self, at: Coordinates) -> tuple[int, int]:
        """(group, number of the replica in it) of the rank at these coordinates."""
        group = at.dp * self.placed.layout.cp + at.cp
        return (group * self.placed.layout.tp + at.tp, 0) if self.placed.sequence_parallel else (group, at.tp)

    def ranks_of(self, group: int) -> tuple[int, ...]:
        """The replicas of a group."""
        tps: Sequence[int] = range(self.placed.layout.tp)
        if self.placed.sequence_parallel:
            group, tp = divmod(group, self.placed.layout.tp)
            tps = (tp,)
        dp, cp = divmod(group, self.placed.layout.cp)
        return tuple(rank_at(self.placed, tp=tp, cp=cp, dp=dp, pp=self.stage) for tp in tps)


def sender_of(receiver: int, group: int, replica: int, holders: Sequence[int]) -> int:
    """The replica among `holders` that serves `receiver`, which is `replica` of `group` on the receiving side."""
    return receiver if receiver in holders else holders[(group + replica) % len(holders)]


def outgoing(
    rank: int, replicas: Sequence[int], other: Side, blocks: Iterable[tuple[int, Integers]]
) -> tuple[Part, ...]:
    """What `rank`, one of the `replicas` of its group, sends: to each group of `other` the rows that belong to it."""
    parts = []
    for group, rows in blocks:
        for replica, receiver in enumerate(other.ranks_of(group)):
            if sender_of(receiver, group, replica, replicas) == rank:
                parts.append(Part(receiver, _compact(rows), len(rows)))
    return tuple(parts)


def incoming(
    rank: int, group: int, replica: int, other: Side, blocks: Iterable[tuple[int, Integers]]
) -> tuple[Part, ...]:
    """What `rank`, `replica` of `group`, receives: from each group of `other` the rows that it holds."""
    return tuple(
        Part(sender_of(rank, group, replica, other.ranks_of(held_by)), _compact(rows), len(rows))
        for held_by, rows in blocks
    )


def blocks_of(groups: Integers, first: int) -> list[tuple[int, Integers]]:
    """(group, row numbers) for each group that occurs, ascending; row first + i belongs to groups[i]."""
    if not len(groups):
        return []
    if (groups == groups[0]).all():  # most often: nothing leaves its slot
        return [(int(groups[0]), np.arange(first, first + len(groups)))]
    return [(group, np.flatnonzero(groups == group) + first) for group in np.unique(groups).tolist()]


def _compact(rows: Integers) -> Rows:
    first, count = int(rows[0]), len(rows)
    return slice(first, first + count) if int(rows[-1]) == first + count - 1 else rows
