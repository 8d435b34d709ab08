"""One rank's part of a schedule: its actions in the one order, what of them each track runs, who waits for whom, and
when the messages that come are expected.

order    vision.0F0 llm.0F0 vision.0F1 llm.0B0 ...
track 0  llm.0F0 llm.0B0 ...                          llm.0F0 waits for vision.0F0: it is on another track
track 1  vision.0F0 vision.0F1 ...
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.schedules import Action, Kind, Schedule
from megatron_mosaic.schedules.communication.transfers import Transfer, insert_transfers
from megatron_mosaic.schedules.passes import project


@dataclass(frozen=True, kw_only=True)
class RankProgram:
    """`waits`: action -> what of this rank has to be done before, on other tracks. On its own the order sees to it.

    `receives`: action -> the messages to expect once it is done; None -> those of the step's start. Where the schedule
    puts them nothing blocks (`schedules.communication`).
    """

    actions: tuple[Action, ...]
    tracks: Mapping[int, tuple[Action, ...]]
    waits: Mapping[Action, tuple[Action, ...]]
    receives: Mapping[Action | None, tuple[Transfer, ...]] = FrozenMap()

    @classmethod
    def of(cls, schedule: Schedule, lanes: Collection[str]) -> RankProgram:
        """The program of a rank that has these lanes."""
        actions = project(schedule, lanes)
        track = {action: schedule.tracks[action.lane] for action in actions}
        tracks = {number: tuple([a for a in actions if track[a] == number]) for number in sorted({*track.values()})}
        waits = {}
        for action in actions if len(tracks) > 1 else ():
            needs = tuple([need for need in schedule.needs(action) if track.get(need, track[action]) != track[action]])
            if needs:
                waits[action] = needs
        receives: dict[Action | None, tuple[Transfer, ...]] = {}
        for own in tracks.values():
            here = {action.lane for action in own}
            for slot in insert_transfers(schedule, here):
                found = tuple([transfer for transfer in slot.posts if transfer.target.lane in here])
                receives[slot.action] = (*receives.get(slot.action, ()), *found)
        return cls(actions=actions, tracks=tracks, waits=waits, receives=receives)

    @cached_property
    def awaited(self) -> frozenset[Action]:
        """Actions that another track waits for."""
        return frozenset(need for needs in self.waits.values() for need in needs)

    @cached_property
    def alone(self) -> frozenset[Action]:
        """Actions of the units that begin when all tracks but one have done their last action."""
        if len(self.tracks) < 2:
            return frozenset()
        track = self.track_of[self.actions[-1]]
        others = [place for place, action in enumerate(self.actions) if self.track_of[action] != track]
        late = {a._replace(kind=Kind.F) for a in self.actions[others[-1] + 1 :] if a.kind is Kind.F}
        return frozenset(action for action in self.actions if action._replace(kind=Kind.F) in late)

    @cached_property
    def track_of(self) -> Mapping[Action, int]:
        """Action -> the track that runs it."""
        return {action: track for track, actions in self.tracks.items() for action in actions}
