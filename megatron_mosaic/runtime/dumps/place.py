"""Where a dumped array belongs: in which slice of which whole tensor, and from which number on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mosaic.runtime.parameters import Cut

Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A flat run of numbers of a slice of a whole tensor, from number `start` of the slice on.

    `name`: `module/parameter` of the whole module; `cut`: which slice, None if it is the whole; `shape`: of the slice.
    """

    name: str
    cut: Cut | None
    shape: tuple[int, ...]
    start: int

    @property
    def key(self) -> str:
        """As text; `parse` reads it."""
        cut = (self.cut.dim, self.cut.pieces, self.cut.rank, self.cut.size) if self.cut else ()
        return "|".join([self.name, *(_numbers(part) for part in (cut, self.shape, (self.start,)))])

    @classmethod
    def parse(cls, key: str) -> Place:
        """The place whose key it is."""
        name, *parts = key.split("|")
        cut, shape, (start,) = (tuple(map(int, part.split("x"))) if part else () for part in parts)
        found = Cut(dim=cut[0], pieces=cut[1], rank=cut[2], size=cut[3]) if cut else None
        return cls(name=name, cut=found, shape=shape, start=start)

    def of(self, whole: Numbers, length: int) -> Numbers:
        """The `length` numbers of the whole tensor that stand here, flat."""
        own = self.cut.of(torch.from_numpy(whole)).numpy() if self.cut else whole
        return own.reshape(-1)[self.start : self.start + length]


def _numbers(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
