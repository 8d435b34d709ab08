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
    """Processor sharing: with t threads at work on c cores each action runs at rate min(1, c / t)."""

    cores: int
    threads: tuple[int, ...]  # of an action, on all slots of a class together

    def rate(self, at_work: int) -> float:
        """Of every action, with so many threads at work."""
        return min(1.0, self.cores / at_work) if at_work else 1.0

    def rates(self, slots: Sequence[int]) -> Sequence[float]:
        return [self.rate(sum(map(self.threads.__getitem__, slots)))] * len(slots)

    def crowding(self, num_ranks: int) -> float:
        return max(1.0, num_ranks / self.cores)

    def least_s(self, busy_s: Sequence[float]) -> float:
        return sum(seconds * threads for seconds, threads in zip(busy_s, self.threads)) / self.cores
