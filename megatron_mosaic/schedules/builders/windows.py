"""The backbone's bubbles, and cuts through its pipeline that lie in them.

    llm.0 | F0 F1 F2 .  .  .  .  B0 ...        a cut: after so many actions of each stage, here (3, 0, 0)
    llm.1 | .  F0 F1 .  .  B0 B0 ...           what stands before it needs nothing behind it, so a piece of other work
    llm.2 | .  .  F0 B0 B0 F1 ...              may run there on all stages, on each where it is idle

Cuts of successive pieces grow, so that between two pieces there is some of the backbone, and all of it is one order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf

from megatron_mosaic.schedules.actions import Action
from megatron_mosaic.schedules.builders.backbone import BackboneClock
from megatron_mosaic.schedules.lane_work import LaneWork

Cut = tuple[int, ...]  # by stage of the backbone, how many of its actions stand before


class Windows:
    """Bubbles of each stage, and what of each is `_left`. Times are those of the clock, `scale` times finer."""

    def __init__(self, clock: BackboneClock, work: LaneWork, scale: int) -> None:
        """`work`: of all modules; the backbone's is what counts."""
        self._clock = clock
        self._lanes = [work.lanes[f"{clock.module}.{stage}"] for stage in range(work.num_stages[clock.module])]
        self._place = {action: (stage, i) for stage, lane in enumerate(self._lanes) for i, action in enumerate(lane)}
        self._starts = [[scale * clock.start[action] for action in lane] for lane in self._lanes]
        self._bubbles: list[list[float]] = []
        self._needs: list[list[Cut]] = []  # by stage and number of its actions, what must stand before those
        for stage, lane in enumerate(self._lanes):
            ends = [0, *[scale * clock.end[action] for action in lane]]
            self._bubbles.append([start - end for start, end in zip([*self._starts[stage], inf], ends)])
            before, rows = [0] * len(self._lanes), [(0,) * len(self._lanes)]
            for action in lane:
                for at, place in [self._place[need] for need in work.needs(action) if need in self._place]:
                    before[at] = max(before[at], place + 1)
                rows.append(tuple(before))
            self._needs.append(rows)
        self._left = [*map(list, self._bubbles)]

    def clear(self) -> None:
        """Nothing has been taken."""
        self._left = [*map(list, self._bubbles)]

    @property
    def nothing(self) -> Cut:
        """Before all."""
        return (0,) * len(self._lanes)

    @property
    def everything(self) -> Cut:
        """After all."""
        return tuple(map(len, self._lanes))

    def at(self, time: float) -> Cut:
        """The cut through all that begins before a time: every stage is at the same moment."""
        return tuple(sum(start < time for start in starts) for starts in self._starts)

    def after(self, actions: Collection[Action]) -> Cut:
        """The least cut behind these actions."""
        least = list(self.nothing)
        for stage, place in (self._place[action] for action in actions):
            least[stage] = max(least[stage], place + 1)
        return self._closed(least)

    def before(self, actions: Collection[Action]) -> Cut:
        """The farthest that each stage may be while none of these has run."""
        farthest = list(self.everything)
        for stage, place in (self._place[action] for action in actions):
            farthest[stage] = min(farthest[stage], place)
        return tuple(farthest)

    def fit(self, duration: int, stages: Collection[int], least: Cut, farthest: Cut) -> Cut | None:
        """The least cut at which all these stages are idle so long; None if there is none in these bounds."""
        cut = least
        while True:
            moved = list(cut)
            for stage in stages:
                left = self._left[stage]
                while moved[stage] <= farthest[stage] and left[moved[stage]] < duration:
                    moved[stage] += 1
            if any(own > last for own, last in zip(moved, farthest)):
                return None
            closed = self._closed(moved)
            if closed == cut:
                return cut
            cut = closed

    def take(self, duration: int, stages: Collection[int], cut: Cut) -> None:
        """Use up what `fit` has found."""
        for stage in stages:
            self._left[stage][cut[stage]] -= duration

    def between(self, before: Cut, after: Cut) -> list[Action]:
        """The backbone's actions from one cut to the next, by their starts."""
        found = [a for lane, low, high in zip(self._lanes, before, after) for a in lane[low:high]]
        return sorted(found, key=lambda action: (self._clock.start[action], action.stage))

    def _closed(self, cut: Sequence[int]) -> Cut:
        """With all that its actions need."""
        while True:
            found = tuple(map(max, zip(cut, *[rows[n] for rows, n in zip(self._needs, cut)])))
            if found == tuple(cut):
                return found
            cut = found
