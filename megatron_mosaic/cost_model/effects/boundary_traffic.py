"""How much of an edge's rows the busiest rank receives and sends: what the runtime's routes come to, in closed form.

    source rank holds [i/ds, (i+1)/ds) of the items, every (cp x sp)-th token     a rank in both sides keeps
    target rank needs [j/dt, (j+1)/dt) of the items, every (cp x sp)-th token     what it has: no message

Every row goes once to every rank that needs it and lacks it, and a source's replicas share the sending. Exact where
slots hold consecutive items (tests compare it with the runtime's StepMap). On partly overlapping ranks the runtime
keeps items where they are and fills slots with the rest: what a rank receives is at most this, but what is sent may
be more, in few cases (source 0,2,4 dp3, target 0-2,4 dp4: 640 rows, here 512).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.plan import ModulePlan

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Shares of all rows of a global microbatch; the way back is the same with the two swapped."""

    received_frac: float  # by the rank that receives most
    sent_frac: float  # by the rank that sends most, if a source's replicas share evenly
    crosses: tuple[int, int]  # the lowest and the highest rank that take part

    @property
    def busiest_frac(self) -> float:
        return max(self.received_frac, self.sent_frac)


@dataclass(frozen=True, slots=True)
class _Side:
    """Ranks of one stage, and what each of them holds."""

    ranks: Integers
    dp: Integers
    shard: Integers  # of the tokens
    num_slots: int
    cuts: tuple[int, int]  # cp, and tp under sequence parallelism

    @property
    def num_shards(self) -> int:
        return self.cuts[0] * self.cuts[1]


@lru_cache(maxsize=4096)
def boundary_traffic(source: ModulePlan, target: ModulePlan) -> Traffic:
    """From the last stage of `source` to the first of `target`."""
    sends, needs = _side(source, source.layout.pp - 1), _side(target, 0)
    needed = np.full(len(needs.ranks), 1 / (needs.num_slots * needs.num_shards))
    _, at_source, at_target = np.intersect1d(sends.ranks, needs.ranks, assume_unique=True, return_indices=True)
    kept = np.zeros_like(needed)
    kept[at_target] = _overlap(sends, needs, at_source, at_target)
    received = needed - kept
    everyone = (int(min(sends.ranks.min(), needs.ranks.min())), int(max(sends.ranks.max(), needs.ranks.max())))
    return Traffic(
        received_frac=float(received.max()), sent_frac=float(received.sum()) / len(sends.ranks), crosses=everyone
    )


def _side(placed: ModulePlan, stage: int) -> _Side:
    layout = placed.layout
    size = layout.num_ranks // layout.pp
    position = np.arange(size)
    tp, cp, dp = position % layout.tp, position // layout.tp % layout.cp, position // (layout.tp * layout.cp)
    split = layout.tp if placed.sequence_parallel else 1
    ranks = np.array(placed.ranks.ranks[stage * size : (stage + 1) * size])
    return _Side(ranks, dp, cp * split + tp % split, layout.dp, (layout.cp, split))


def _overlap(sends: _Side, needs: _Side, at_source: Integers, at_target: Integers) -> Floats:
    """Share of all rows that a rank on both sides has and needs."""
    i, j = sends.dp[at_source] / sends.num_slots, needs.dp[at_target] / needs.num_slots
    items = np.minimum(i + 1 / sends.num_slots, j + 1 / needs.num_slots) - np.maximum(i, j)
    if sends.cuts == needs.cuts:
        tokens = (sends.shard[at_source] == needs.shard[at_target]) / sends.num_shards
    else:  # of shards that are cut differently, what two random ones have in common; all of one side's if it is whole
        tokens = np.full(len(at_source), 1 / (sends.num_shards * needs.num_shards))
    return np.asarray(np.maximum(items, 0.0) * tokens)
