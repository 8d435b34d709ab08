"""How lanes that run on one device at the same time slow each other down: memory, the host, and what is left over.

Each lane computes on SMs or cores of its own. What they share is divided max-min fairly: nobody gets more than it asks
for, and what a modest lane leaves goes to the greedy ones. A lane that is given less takes longer in proportion.

    memory     a lane that moves `moved_bytes` in `alone_s` demands their quotient of the memory's bandwidth, and alone
               it had no more than all of it; a lane whose `footprint_bytes` fit into `cache_bytes` demands nothing
    host       launches of one process: `serial_frac` of a lane's `host_s` is time that nobody beside it can spend
    residual   everything else (caches, memory pages): a factor 1 + residual x share of the bandwidth that others take

The constants are fitted to measured pairs by `mosaic calibrate`. Until they are, memory is shared and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mosaic.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CoRunner:
    """One lane's action on its own SMs or cores: seconds if nobody were beside it, of them the host's own; bytes that
    it moves, and bytes that it comes back to (infinite: no cache holds them)."""

    alone_s: float
    moved_bytes: float
    footprint_bytes: float = math.inf
    host_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alone_s > 0 and self.moved_bytes >= 0 and self.footprint_bytes > 0 and self.host_s >= 0):
            raise ConfigError(
                "co-running lane",
                got=f"{self.moved_bytes} bytes in {self.alone_s} s, footprint {self.footprint_bytes}, {self.host_s} s",
                expected="bytes of at least 0 in a time above 0",
                fix="predict the lane alone first",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """Constants of a device. `is_measured`: they were fitted to pairs; else memory is shared, and nothing else."""

    bandwidth_bytes_per_s: float
    residual: float = 0.0
    serial_frac: float = 0.0
    cache_bytes: float = 0.0
    is_measured: bool = False

    def slow_downs(self, lanes: Sequence[CoRunner], speed: float = 1.0) -> tuple[float, ...]:
        """Factor of each lane's time while all of them run: at least 1, and 1 for a lane on its own. `speed`: at which
        they would run otherwise, where they share cores too."""
        if len(lanes) == 1:
            return (1.0,)
        bandwidth = self.bandwidth_bytes_per_s
        demands = [speed * self._bytes_per_s(lane) for lane in lanes]
        granted = share_max_min(demands, bandwidth)
        total = sum(granted)
        launches = [speed * min(1.0, self.serial_frac * lane.host_s / lane.alone_s) for lane in lanes]
        launched = share_max_min(launches, 1.0)
        return tuple(
            max(_lack(demand, given) * (1 + self.residual * (total - given) / bandwidth), _lack(asked, done))
            for demand, given, asked, done in zip(demands, granted, launches, launched)
        )

    def until_all_end_s(self, lanes: Sequence[CoRunner]) -> float:
        """Seconds until lanes that begin together have all ended; those that are left go on faster."""
        left, now = {i: lane.alone_s for i, lane in enumerate(lanes)}, 0.0
        while left:
            slow = self.slow_downs([lanes[i] for i in left])
            step = min(work * factor for work, factor in zip(left.values(), slow))
            now += step
            after = {i: work - step / factor for (i, work), factor in zip(left.items(), slow)}
            left = {i: work for i, work in after.items() if work > 1e-12 * lanes[i].alone_s}
        return now

    def gain_beside(self, in_turns_s: Sequence[float], lanes: Sequence[CoRunner]) -> float:
        """How much faster lanes are beside each other, on what each is granted, than one after the other on the whole
        device, in `in_turns_s`. Above 1: let them run side by side."""
        return sum(in_turns_s) / self.until_all_end_s(lanes)

    def _bytes_per_s(self, lane: CoRunner) -> float:
        missing = max(0.0, 1 - self.cache_bytes / lane.footprint_bytes)
        return min(missing * lane.moved_bytes / lane.alone_s, self.bandwidth_bytes_per_s)


def share_max_min(demands: Sequence[float], capacity: float) -> tuple[float, ...]:
    """What each gets of `capacity`: its demand, or an equal part of what those with smaller demands leave."""
    granted = [0.0] * len(demands)
    left, waiting = capacity, sorted(range(len(demands)), key=lambda i: demands[i])
    for position, index in enumerate(waiting):
        granted[index] = min(demands[index], left / (len(waiting) - position))
        left -= granted[index]
    return tuple(granted)


def _lack(demand: float, given: float) -> float:
    return demand / given if given else 1.0
