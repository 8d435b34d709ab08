"""What ranks compute on: how fast actions run that run at the same time. The clock asks at every event.

Lanes of one GPU that work at the same time on tracks of their own slow each other down (`effects/interference.py`):
another `Machine`, once a GPU's residual has been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Machine(Protocol):
    """All ranks' devices."""

    def rates(self, slots: Sequence[int]) -> Sequence[float]:
        """Of the actions at work, one on each of these classes of dp slots (by number): 1 is as fast as alone."""

    def crowding(self, num_ranks: int) -> float:
        """Factor by which so many ranks slow each other down that compute on a thread each."""

    def least_s(self, busy_s: Sequence[float]) -> float:
        """No step is shorter in which all slots of class i would alone be busy for `busy_s[i]`."""


@dataclass(frozen=True, slots=True)
class OwnDevices:
    """Every rank owns its device, and what runs on it takes turns."""

    def rates(self, slots: Sequence[int]) -> Sequence[float]:
        return [1.0] * len(slots)

    def crowding(self, num_ranks: int) -> float:
        return 1.0

    def least_s(self, busy_s: Sequence[float]) -> float:
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCores:
    """Processor sharing: with t threads at work on c cores each action runs at rate min(1, c / t), or slower by what
    was measured that many threads cost one another beyond their turns.

    `slow_downs`: (threads at work, factor by which each is slower), ascending; straight lines between, and on from the
    last one in proportion to the threads.
    """

    cores: int
    threads: tuple[int, ...]  # of an action, on all slots of a class together
    slow_downs: tuple[tuple[int, float], ...] = ()

    def rate(self, at_work: int) -> float:
        """Of every action, with so many threads at work."""
        turns = max(1.0, at_work / self.cores)
        below = (1, 1.0)
        for threads, factor in self.slow_downs:
            if at_work <= threads:
                share = (at_work - below[0]) / max(1, threads - below[0])
                return 1 / max(turns, below[1] + share * (factor - below[1]))
            below = (threads, factor)
        return 1 / max(turns, below[1] * max(1.0, at_work / max(below[0], self.cores)))

    def rates(self, slots: Sequence[int]) -> Sequence[float]:
        return [self.rate(sum(map(self.threads.__getitem__, slots)))] * len(slots)

    def crowding(self, num_ranks: int) -> float:
        return 1 / self.rate(num_ranks)

    def least_s(self, busy_s: Sequence[float]) -> float:
        return sum(seconds * threads for seconds, threads in zip(busy_s, self.threads)) / self.cores
