"""Which item goes to which slot of which module, and which rows tie the items together. Pure integers.

Computed alike on every rank from metadata alone (who brings what, how long), so nothing is negotiated.

global microbatch: samples 0 1 | 2 3        backbone slots own samples in blocks of micro_batch_size
images             0   1 2 |   3            other modules share out their items by cost, whoever owns the sample
links              image 1 rows 0..15 -> sample 1 from token 5 on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.plan import ModulePlan

Integers = NDArray[np.int64]


def integers(values: Sequence[int] | Integers) -> Integers:
    """One-dimensional int64."""
    return np.asarray(values, dtype=np.int64).reshape(-1)


@dataclass(frozen=True, slots=True)
class Items:
    """What a batch brings to one module, in sample order: whose each item is, and how many tokens it has."""

    samples: Integers  # ascending; item i belongs to samples[i]
    tokens: Integers

    def __post_init__(self) -> None:
        assert len(self.samples) == len(self.tokens) and (np.diff(self.samples) >= 0).all(), "items in sample order"

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class Links:
    """What flows along one edge in a batch, in sample order.

    Link k: rows[k] consecutive tokens of source item source_items[k], from its token source_starts[k] on, become rows
    of target item target_items[k], from its token target_starts[k] on. A row that is read twice has two links; no two
    links end on the same token.
    """

    source_items: Integers
    source_starts: Integers
    target_items: Integers
    target_starts: Integers
    rows: Integers

    def __post_init__(self) -> None:
        ends = (self.source_items, self.source_starts, self.target_items, self.target_starts)
        assert all(len(column) == len(self.rows) for column in ends), "a row of the table for each link"

    def __len__(self) -> int:
        return len(self.rows)


def rows_of(items: Integers, starts: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """(token, item) of every row of one end of some links, link by link."""
    link, within = expand(counts)
    return starts[link] + within, items[link]


def expand(counts: Integers) -> tuple[Integers, Integers]:
    """For each of sum(counts) rows: which count it belongs to, and its number within."""
    link = np.arange(len(counts)).repeat(counts)
    starts = counts.cumsum() - counts
    return link, np.arange(len(link)) - starts[link]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds of a module's unit: all tokens of some items, or, with cp or sequence parallelism, some.

    Steps with the same items share it: its arrays are not to be written to.
    Items that are shorter than `length` are padded at the end. Token order is that of the tensors: with cp the rank
    holds two chunks of 2*cp, number cp_rank and its mirror image, so that causal attention costs every rank the same.
    """

    items: tuple[int, ...]  # numbers in the unit, ascending
    length: int  # tokens of every item after padding
    cp_tokens: Integers = field(repr=False)  # positions this cp rank computes
    tokens: Integers = field(repr=False)  # positions in its hidden states; differs under sequence parallelism only


def shard_of(placed: ModulePlan, items: Sequence[int], lengths: Integers, *, cp: int = 0, tp: int = 0) -> Shard:
    """The share of the rank at (cp, tp) of a slot that holds `items`; `lengths`: tokens of every item of the unit."""
    longest = int(lengths[list(items)].max()) if len(items) else 0
    length = padded_length(placed, longest)
    cp_tokens = tokens = _cp_tokens(length, placed.layout.cp, cp)
    if placed.sequence_parallel:
        size = len(cp_tokens) // placed.layout.tp
        tokens = cp_tokens[tp * size : (tp + 1) * size]
    return Shard(items=tuple(items), length=length, cp_tokens=cp_tokens, tokens=tokens)


def padded_length[T: (int, Integers)](placed: ModulePlan, tokens: T) -> T:
    """The next length that cp and sequence parallelism can split; of one number of tokens, or of each of many."""
    cp, tp = placed.layout.cp, placed.layout.tp if placed.sequence_parallel else 1
    multiple = (2 * cp if cp > 1 else 1) * tp
    return -(-tokens // multiple) * multiple


def _cp_tokens(length: int, cp: int, rank: int) -> Integers:
    if cp == 1:
        return np.arange(length, dtype=np.int64)
    chunks = np.arange(length, dtype=np.int64).reshape(2 * cp, -1)
    return np.concatenate([chunks[rank], chunks[2 * cp - 1 - rank]])
