"""Messages between lanes: who posts what after which action.

    order       ... llm.0F1 ... llm.1B0 ... llm.1F1 ...          llm.1F1 needs llm.0F1
    llm.0's rank    llm.0F1 [send llm.0F1>llm.1F1]               posted where its result is made
    llm.1's rank    ... [receive llm.0F1>llm.1F1] llm.1B0 ...    posted where that stands in the order

Receives posted like this are safe even where a communication kernel blocks its rank until every transfer that the rank
has posted is matched (NCCL's worst case; gloo never blocks): all ranks post by one order, so the first transfer in it
that is not matched has nobody before it to wait for. Posted earlier (at the step's start) they wait for ranks that wait
for them; posted later (by the action that needs them) senders do. The runtime posts them here; tests ask the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple

from megatron_mosaic.schedules.actions import Action
from megatron_mosaic.schedules.schedule import Schedule

Process = tuple[Hashable, int]  # a class of alike ranks, and a track of it: what runs one action at a time


class Transfer(NamedTuple):
    """What one action makes and another one, of another lane, needs."""

    source: Action
    target: Action

    def __str__(self) -> str:
        return f"{self.source}>{self.target}"


class Slot(NamedTuple):
    """An action (None: the start of the step), and what is posted after it, as one batch."""

    action: Action | None
    posts: tuple[Transfer, ...]


def list_transfers(schedule: Schedule) -> tuple[Transfer, ...]:
    """All messages of a step, in the order in which they are made: an action's own by the unit that they are for."""
    found = [Transfer(need, action) for action in schedule.order for need in schedule.needs(action)]
    position = {action: place for place, action in enumerate(schedule.order)}
    apart = [transfer for transfer in found if transfer.source.lane != transfer.target.lane]
    return tuple(sorted(apart, key=lambda transfer: (position[transfer.source], transfer.target)))


def insert_transfers(schedule: Schedule, lanes: Collection[str]) -> tuple[Slot, ...]:
    """The program of a rank (or track) with these lanes: its actions, and after each what it sends and receives."""
    position = {action: place for place, action in enumerate(schedule.order)}
    own = [action for action in schedule.order if action.lane in lanes]
    places = [position[action] for action in own]
    posts: list[list[Transfer]] = [[] for _ in range(len(own) + 1)]
    for transfer in list_transfers(schedule):
        if transfer.source.lane in lanes or transfer.target.lane in lanes:
            posts[bisect_right(places, position[transfer.source])].append(transfer)
    return tuple(Slot(action, tuple(made)) for action, made in zip([None, *own], posts))


def programs_with_transfers(
    schedule: Schedule, occupies: Mapping[str, frozenset[Hashable]]
) -> dict[Process, tuple[Slot, ...]]:
    """Every track of every class of ranks -> its program. `occupies[lane]`: the classes that run it."""
    lanes: dict[Process, list[str]] = {}
    for lane in schedule.lanes:
        for alike in occupies[lane]:
            lanes.setdefault((alike, schedule.tracks[lane]), []).append(lane)
    return {process: insert_transfers(schedule, own) for process, own in lanes.items()}
