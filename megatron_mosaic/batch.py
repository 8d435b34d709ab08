"""Which item goes to which lane of which module, and which rows tie the items together. Pure integers.

Computed alike on every rank from metadata alone (who brings what, how long), so nothing is negotiated.

global microbatch: samples 0 1 | 2 3        backbone lanes own samples in blocks of micro_batch_size
images             0   1 2 |   3            other modules share out their items by cost, whoever owns the sample
links              image 1 rows 0..15 -> sample 1 from token 5 on
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.plan import ModulePlan
from megatron_mosaic.plan.workload import ModuleConfig

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
    """The share of the rank at (cp, tp) of a lane that holds `items`; `lengths`: tokens of every item of the unit."""
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


# -- who computes what -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """Which lane computes each item of a unit."""

    of_item: Integers
    order: Integers = field(repr=False)  # items lane by lane, ascending within each
    starts: Integers = field(repr=False)  # lane d computes order[starts[d] : starts[d + 1]]

    @classmethod
    def of(cls, lane_of_item: Integers, num_lanes: int) -> Lanes:
        """The lanes 0 .. num_lanes - 1, some of them empty."""
        order = np.argsort(lane_of_item, kind="stable")
        return cls(lane_of_item, order, np.searchsorted(lane_of_item[order], np.arange(num_lanes + 1)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Integers]:
        return (self[lane] for lane in range(len(self)))

    def __getitem__(self, lane: int) -> Integers:
        return self.order[self.starts[lane] : self.starts[lane + 1]]

    @property
    def index_in_lane(self) -> Integers:
        """The number of every item within its lane."""
        index = np.empty_like(self.of_item)
        index[self.order] = np.arange(len(self.order)) - self.starts[self.of_item[self.order]]
        return index

    def max_load(self, costs: Integers) -> int:
        """Cost of the busiest lane."""
        loads = np.zeros(len(self), dtype=np.int64)
        np.add.at(loads, self.of_item, costs)
        return int(loads.max())


def split_evenly(num_items: int, num_lanes: int) -> Lanes:
    """Contiguous blocks whose sizes differ by at most one."""
    starts = np.arange(num_lanes + 1) * num_items // num_lanes
    return Lanes(np.arange(num_lanes).repeat(starts[1:] - starts[:-1]), np.arange(num_items), starts)


def item_costs(module: ModuleConfig, tokens: Integers) -> Integers:
    """Relative cost of items of so many tokens: matrix products grow with them, attention with their square."""
    groups = module.num_query_groups or module.num_heads
    kv_size = module.hidden_size * groups // module.num_heads
    experts = module.moe_top_k if module.num_experts else 1
    mlp = experts * module.ffn_hidden_size * (3 if module.gated else 2)
    per_token = module.hidden_size * (2 * module.hidden_size + 2 * kv_size + mlp)
    return tokens * per_token + tokens**2 * (module.hidden_size if module.causal else 2 * module.hidden_size)


def least_load(costs: Integers, num_lanes: int) -> int:
    """What the busiest lane computes at least, however items are shared out."""
    return max(int(costs.max()), -(-int(costs.sum()) // num_lanes)) if len(costs) else 0


def balance_items(costs: Integers, preferred: Sequence[Sequence[int]], num_lanes: int) -> Lanes:
    """Nearly the least possible load of the busiest lane, and few items moved.

    Longest processing time first (Graham 1969: at most 4/3 - 1/(3*lanes) of the optimum) says what load is reachable;
    then each item stays on a lane it prefers (near the rank that owns its sample) while this load is kept, and the
    others fill up the rest.
    """
    cost_of: list[int] = costs.tolist()  # item by item: faster than numpy
    by_cost = sorted(range(len(cost_of)), key=lambda item: -cost_of[item])
    shortest = [0] * len(cost_of)
    limit = _fill(shortest, [0] * num_lanes, by_cost, cost_of)
    kept, loads, moved = [0] * len(cost_of), [0] * num_lanes, []
    for item in by_cost:
        lane = min(preferred[item], key=loads.__getitem__)
        if loads[lane] + cost_of[item] <= limit:
            kept[item] = lane
            loads[lane] += cost_of[item]
        else:
            moved.append(item)
    chosen = kept if _fill(kept, loads, moved, cost_of) <= limit else shortest
    return Lanes.of(integers(chosen), num_lanes)


def _fill(lane_of_item: list[int], loads: Sequence[int], order: Sequence[int], costs: Sequence[int]) -> int:
    """Each item in turn to the lane with the least load. Returns the largest load."""
    heap = [(load, lane) for lane, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in order:
        load, lane = heap[0]
        lane_of_item[item] = lane
        heapq.heapreplace(heap, (load + costs[item], lane))
    return max(heap)[0]
