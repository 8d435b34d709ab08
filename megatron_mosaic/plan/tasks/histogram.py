"""How often a whole number occurs in the data: items of a sample, tokens of an item."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Histogram:
    """(value, its share) by ascending value. Constructor: whole numbers from 0 on, shares above 0 that add up to 1.
    Empty where nothing is known but a mean."""

    bins: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        values, shares = [value for value, _ in self.bins], [share for _, share in self.bins]
        ascending = all(a < b for a, b in itertools.pairwise(values))
        sums_up = not shares or math.isclose(sum(shares), 1.0, rel_tol=1e-9)
        if not ascending or min(values, default=0) < 0 or min(shares, default=1.0) <= 0 or not sums_up:
            raise ConfigError(
                "histogram",
                got=self.bins,
                expected="ascending values from 0 on, shares above 0 with sum 1",
                fix="make it with Histogram.of",
            )

    @classmethod
    def of(cls, counts: Mapping[int, float]) -> Histogram:
        """Value -> how often it was seen, in any unit."""
        total = math.fsum(counts.values())
        total = 1.0 if math.isclose(total, 1.0, rel_tol=1e-12) else total  # shares stay what they are, to the bit
        return cls(tuple((value, counts[value] / total) for value in sorted(counts)))

    def __bool__(self) -> bool:
        return bool(self.bins)

    @property
    def mean(self) -> float:
        return math.fsum(value * share for value, share in self.bins)

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(value for value, _ in self.bins)

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(share for _, share in self.bins)


NO_HISTOGRAM = Histogram()
