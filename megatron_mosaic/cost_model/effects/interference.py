"""How lanes that run on one GPU at the same time slow each other down: memory bandwidth, then what is left over.

Each lane computes on its own SMs, so only memory is shared. A lane that moves `moved_bytes` in `alone_s` demands their
quotient; if the demands exceed the memory's bandwidth it is shared max-min fairly: nobody gets more than it asks for,
and what a modest lane leaves goes to the greedy ones. A lane that is given less takes longer in proportion. The rest
(caches, memory pages) is one fitted factor per GPU type, 1 + residual x share of the bandwidth that the others take;
it is 0 until a GPU has been measured.

No schedule runs two lanes of a GPU at once yet, so this does not enter a predicted step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mosaic.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CoRunner:
    """One lane's action on its own SMs: seconds if it had the memory to itself, and bytes it moves in them."""

    alone_s: float
    moved_bytes: float

    def __post_init__(self) -> None:
        if not (self.alone_s > 0 and self.moved_bytes >= 0):
            raise ConfigError(
                "co-running lane",
                got=f"{self.moved_bytes} bytes in {self.alone_s} s",
                expected="bytes of at least 0 in a time above 0",
                fix="predict the lane alone first",
            )

    @property
    def demand_bytes_per_s(self) -> float:
        return self.moved_bytes / self.alone_s


def share_max_min(demands: Sequence[float], capacity: float) -> tuple[float, ...]:
    """What each gets of `capacity`: its demand, or an equal part of what those with smaller demands leave."""
    granted = [0.0] * len(demands)
    left, waiting = capacity, sorted(range(len(demands)), key=lambda i: demands[i])
    for position, index in enumerate(waiting):
        granted[index] = min(demands[index], left / (len(waiting) - position))
        left -= granted[index]
    return tuple(granted)


def slow_downs(lanes: Sequence[CoRunner], bandwidth_bytes_per_s: float, residual: float = 0.0) -> tuple[float, ...]:
    """Factor of each lane's time while all of them run: at least 1, and 1 for a lane on its own."""
    demands = [lane.demand_bytes_per_s for lane in lanes]
    granted = share_max_min(demands, bandwidth_bytes_per_s)
    total = sum(granted)
    return tuple(
        (demand / given if given else 1.0) * (1 + residual * (total - given) / bandwidth_bytes_per_s)
        for demand, given in zip(demands, granted)
    )
