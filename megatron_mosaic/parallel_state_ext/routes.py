"""Which rank sends which items to which rank when a tensor changes layout between two modules. Pure integers.

Both sides are lists of *lanes* (data-parallel replicas). A lane holds some items, and each of its ranks (the tensor-
parallel replicas) has a copy of all of them. Items are routed once to every rank that needs them:

    source lanes            target lanes              a rank that is in both keeps its own items: no message
    lane 0: ranks 0 1   ->  lane 0: ranks 2           else target replica t reads from source replica t mod TP,
    items 0 1 2             items 0 1                 so the traffic spreads over the source's replicas

The backward route is the same function with the sides swapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LaneItems = Sequence[tuple[Sequence[int], Sequence[int]]]  # per lane: (ranks of its replicas, items it holds)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Items that `sender` hands to `receiver`; positions into their lanes' item lists. Local if they are the same."""

    sender: int
    receiver: int
    items: tuple[int, ...]
    from_positions: tuple[int, ...]
    to_positions: tuple[int, ...]

    @property
    def is_local(self) -> bool:
        return self.sender == self.receiver


def build_route(source: LaneItems, target: LaneItems) -> tuple[Transfer, ...]:
    """Every transfer, ordered by receiver then sender. Each rank of a target lane gets each of its items once.

    Raises KeyError if a target lane needs an item that no source lane holds.
    """
    holder = {item: (lane, position) for lane, (_, items) in enumerate(source) for position, item in enumerate(items)}
    transfers = []
    for ranks, items in target:
        by_lane: dict[int, list[tuple[int, int, int]]] = {}
        for position, item in enumerate(items):
            lane, held_at = holder[item]
            by_lane.setdefault(lane, []).append((item, held_at, position))
        for replica, receiver in enumerate(ranks):
            for lane, moved in by_lane.items():
                senders = source[lane][0]
                sender = receiver if receiver in senders else senders[replica % len(senders)]
                item_ids, from_positions, to_positions = zip(*moved, strict=True)
                transfers.append(Transfer(sender, receiver, item_ids, from_positions, to_positions))
    return tuple(sorted(transfers, key=lambda t: (t.receiver, t.sender)))
