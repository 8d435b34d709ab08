"""What a rank's tracks run on. A backend grants shares of the device and opens one lane for each track.

shares {0: 0.67, 1: 0.33} --backend.open--> Lanes --run(program, perform)--> every action, on its track's lane
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.schedules import Action


class Moment(Protocol):
    """A point in time that is known later: an event on a device's stream."""

    def seconds(self) -> float:
        """On the host's monotonic clock. Waits until it has come."""
        ...


Clock = Callable[[], float | Moment]


def seconds_of(moment: float | Moment) -> float:
    """A moment on the host's monotonic clock."""
    return moment if isinstance(moment, float) else moment.seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneInfo:
    """What a track was granted. `unit`: "SMs", "cores", or "device" where lanes take turns on all of it."""

    track: int
    share: float
    granted: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What a backend does. `enforced`: a lane cannot use more than it was granted; `disjoint`: nor what another has."""

    beside: bool  # lanes run at the same time
    enforced: bool
    disjoint: bool


class Lanes(Protocol):
    """A rank's open lanes."""

    @property
    def infos(self) -> Mapping[int, LaneInfo]:
        """Track -> what it was granted."""
        ...

    @property
    def in_threads(self) -> bool:
        """Whether tracks run in threads of their own; else the caller's runs them all."""
        ...

    @property
    def clock(self) -> Clock:
        """Reads the time where the actions run."""
        ...

    def run(self, program: RankProgram, perform: Callable[[Action], None]) -> None:
        """Perform every action: of a track in its order, and after all that it waits for on others.

        The first error of any lane stops all of them and is raised.
        """
        ...

    def building(self, track: int) -> AbstractContextManager[None]:
        """Around the making of what the track's backwards accumulate into."""
        ...

    def begin_step(self) -> None:
        """Moments from here on are of a new step."""
        ...

    def close(self) -> None:
        """Give back what was granted."""
        ...


class QuotaBackend(Protocol):
    """One way to give the tracks of a rank their shares of its device."""

    @property
    def name(self) -> str: ...

    @property
    def caps(self) -> Caps: ...

    def why_not(self) -> str:
        """Why it cannot be used here; "" if it can. Never raises."""
        ...

    def quantise(self, shares: Mapping[int, float]) -> Mapping[int, LaneInfo]:
        """What would be granted. QuotaError if it cannot be."""
        ...

    def open(self, shares: Mapping[int, float]) -> Lanes:
        """Lanes of what `quantise` says. QuotaError if it cannot be granted."""
        ...


host_clock: Clock = time.monotonic
