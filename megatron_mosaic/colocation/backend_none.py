"""No sharing: a rank's lanes take turns on its whole device, in the schedule's order. The reference of all others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from megatron_mosaic.colocation.lane import Caps, Clock, LaneInfo, Lanes, host_clock
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.schedules import Action


class TurnLanes:
    """One action after the other."""

    in_threads = False

    def __init__(self, infos: Mapping[int, LaneInfo], clock: Clock = host_clock) -> None:
        self.infos, self.clock = infos, clock

    def run(self, program: RankProgram, perform: Callable[[Action], None]) -> None:
        for action in program.actions:
            perform(action)

    def building(self, track: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin_step(self) -> None:
        pass

    def close(self) -> None:
        pass


class NoBackend:
    """Grants every track the whole device while it runs."""

    name = "none"
    caps = Caps(beside=False, enforced=False, disjoint=False)

    def why_not(self) -> str:
        return ""

    def quantise(self, shares: Mapping[int, float]) -> dict[int, LaneInfo]:
        return {
            track: LaneInfo(track=track, share=share, granted=1, total=1, unit="device")
            for track, share in shares.items()
        }

    def open(self, shares: Mapping[int, float]) -> Lanes:
        return TurnLanes(self.quantise(shares))
