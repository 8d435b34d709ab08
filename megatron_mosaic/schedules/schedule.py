"""The whole truth about order: what every lane does, one total order of all of it, and which lanes share a track.

    order  | vision.0F0 llm.0F0 vision.0F1 llm.0B0 ...      a rank's program on a track is what of it runs there
    tracks | vision.0:1                                     lanes of one track take turns; tracks run at the same time

No times. Executor, simulator, memory model and validator read this object and derive nothing. `text.py` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.lane_work import LaneWork
from megatron_mosaic.schedules.pictures import render_order_violation


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTable:
    """A schedule by position in its order, for those who read it fast: parallel tuples."""

    lanes: tuple[str, ...]
    lane: tuple[int, ...]  # position -> number of its lane
    kind: tuple[Kind, ...]
    needs: tuple[tuple[int, ...], ...]  # position -> positions, all of them earlier


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Constructor: `order` holds every action once, keeps each lane's own order, and puts needs first.

    `tracks`: lane -> track; lanes that are left out are on track 0. Whatever follows such an order never deadlocks.
    """

    name: str
    work: LaneWork
    order: tuple[Action, ...]
    tracks: Mapping[str, int] = FrozenMap()

    def __post_init__(self) -> None:
        unknown = sorted({*self.tracks} - {*self.lanes})
        if unknown or any(track < 0 for track in self.tracks.values()):
            raise ScheduleError(
                f"schedule {self.name!r}: tracks",
                got=dict(self.tracks),
                expected=f"tracks from 0 on, of {', '.join(self.lanes)}",
                fix="correct the line",
            )
        tracks = {lane: self.tracks.get(lane, 0) for lane in self.lanes}
        object.__setattr__(self, "tracks", FrozenMap(tracks))
        self.table  # noqa: B018  raises where the order is wrong

    @property
    def lanes(self) -> Mapping[str, tuple[Action, ...]]:
        return self.work.lanes

    @property
    def num_microbatches(self) -> int:
        return self.work.num_microbatches

    def needs(self, action: Action) -> tuple[Action, ...]:
        """The actions that must finish before this one may start."""
        return self.work.needs(action)

    @cached_property
    def table(self) -> ActionTable:
        """The schedule in numbers. ScheduleError where the order misses an action or puts one before its needs."""
        numbers = self.work.numbers
        position = [-1] * len(numbers.actions)
        due = numbers.first[:-1]  # by lane, the action that is next
        lane_of, needs_of, number_of = numbers.lane, numbers.needs, numbers.number_of
        lanes, needs = [], []
        for place, action in enumerate(self.order):
            if action not in number_of:
                raise self._wrong(f"{action}, which no lane has", "the actions of the lanes")
            number = number_of[action]
            lane = lane_of[number]
            found = tuple([position[need] for need in needs_of[number]])
            if number != due[lane] or -1 in found:
                raise self._wrong(render_order_violation(self.work, self.order, place), "needs first, lanes in order")
            due[lane] = number + 1
            position[number] = place
            lanes.append(lane)
            needs.append(found)
        if len(self.order) != len(numbers.actions):
            missing = [str(numbers.actions[number]) for number, place in enumerate(position) if place < 0]
            raise self._wrong(f"{len(missing)} actions less, e.g. {missing[0]}", f"all {len(position)} actions")
        kinds = tuple([action[2] for action in self.order])
        return ActionTable(lanes=numbers.lanes, lane=tuple(lanes), kind=kinds, needs=tuple(needs))

    def _wrong(self, got: str, expected: str) -> ScheduleError:
        return ScheduleError(f"schedule {self.name!r}: order", got=got, expected=expected, fix="correct the order")
