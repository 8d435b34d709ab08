"""What ranks compute on: how fast actions run that run at the same time. The clock asks at every event.

OwnDevices   every rank its own, and what runs on it takes turns: always at full speed
SharedCores  all ranks on the cores of one host
Beside       one of these, where lanes on tracks of one rank work at the same time and slow each other down
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_mosaic.cost_model.effects.interference import CoRunner, Interference


class Machine(Protocol):
    """All ranks' devices."""

    def rates(self, slots: Sequence[int], jobs: Sequence[int]) -> Sequence[float]:
        """Of the actions at work, each a job on one class of dp slots (by number): 1 is as fast as alone."""

    def crowding(self, num_ranks: int) -> float:
        """Factor by which so many ranks slow each other down that compute on a thread each."""

    @property
    def undisturbed(self) -> Machine:
        """If threads took turns on cores, and cost each other nothing else."""

    def least_s(self, busy_s: Sequence[float]) -> float:
        """No step is shorter in which all slots of class i would alone be busy for `busy_s[i]`."""


@dataclass(frozen=True, slots=True)
class OwnDevices:
    """Every rank owns its device, and what runs on it takes turns."""

    def rates(self, slots: Sequence[int], jobs: Sequence[int]) -> Sequence[float]:
        return [1.0] * len(slots)

    def crowding(self, num_ranks: int) -> float:
        return 1.0

    @property
    def undisturbed(self) -> OwnDevices:
        return self

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

    def rates(self, slots: Sequence[int], jobs: Sequence[int]) -> Sequence[float]:
        return [self.rate(sum(map(self.threads.__getitem__, slots)))] * len(slots)

    def crowding(self, num_ranks: int) -> float:
        return 1 / self.rate(num_ranks)

    @property
    def undisturbed(self) -> SharedCores:
        return replace(self, slow_downs=())

    def least_s(self, busy_s: Sequence[float]) -> float:
        return sum(seconds * threads for seconds, threads in zip(busy_s, self.threads)) / self.cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Devices on which several tracks work at the same time. An action on several devices (its collectives join them)
    is as fast as on the one where it is slowest. What was measured of crowded ranks and what was measured of tracks are
    in part the same: the slower of the two counts, not both."""

    alone: Machine
    devices: tuple[tuple[int, ...], ...]  # by slot class, those of its kinds of ranks that have several tracks
    runners: tuple[CoRunner, ...]  # by job
    interference: Interference
    _known: dict[tuple[tuple[int, ...], float], tuple[float, ...]] = field(default_factory=dict, compare=False)

    def rates(self, slots: Sequence[int], jobs: Sequence[int]) -> Sequence[float]:
        alone, turns = self.alone.rates(slots, jobs), self.alone.undisturbed.rates(slots, jobs)
        on: dict[int, list[int]] = {}
        for position, each in enumerate(slots):
            for device in self.devices[each]:
                on.setdefault(device, []).append(position)
        slow = [1.0] * len(slots)
        for found in on.values():
            if len(found) > 1:
                factors = self._slow_downs(tuple([jobs[i] for i in found]), turns[found[0]])
                for i, factor in zip(found, factors):
                    slow[i] = max(slow[i], factor)
        return [min(rate, turn / factor) for rate, turn, factor in zip(alone, turns, slow)]

    def crowding(self, num_ranks: int) -> float:
        return self.alone.crowding(num_ranks)

    @property
    def undisturbed(self) -> Machine:
        return self.alone.undisturbed

    def least_s(self, busy_s: Sequence[float]) -> float:
        return self.alone.least_s(busy_s)

    def _slow_downs(self, jobs: tuple[int, ...], speed: float) -> tuple[float, ...]:
        if (jobs, speed) not in self._known:
            self._known[jobs, speed] = self.interference.slow_downs([self.runners[job] for job in jobs], speed)
        return self._known[jobs, speed]
