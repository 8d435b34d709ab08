"""Which item goes to which lane of which module, and which rows tie the items together. Pure integers.

Computed alike on every rank from metadata alone (who brings what, how long), so nothing is negotiated.

global microbatch: samples 0 1 | 2 3        backbone lanes own samples in blocks of micro_batch_size
images             0   1 2 |   3            other modules share out their items by cost, whoever owns the sample
links              image 1 rows 0..15 -> sample 1 from token 5 on
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.plan import ModulePlan
from megatron_mosaic.workload import ModuleConfig

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

    def __len__(self) -> int:
        return len(self.rows)


def rows_of(items: Integers, starts: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """(token, item) of every row of one end of some links, link by link."""
    link, within = expand(counts)
    return starts[link] + within, items[link]


def expand(counts: Integers) -> tuple[Integers, Integers]:
    """For each of sum(counts) rows: which count it belongs to, and its number within."""
    link = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return link, np.arange(len(link)) - np.repeat(starts, counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds of a module's unit: all tokens of some items, or, with cp or sequence parallelism, some.

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


def padded_length(placed: ModulePlan, tokens: int) -> int:
    """The next length that cp and sequence parallelism can split."""
    cp, tp = placed.layout.cp, placed.layout.tp if placed.sequence_parallel else 1
    multiple = (2 * cp if cp > 1 else 1) * tp
    return -(-tokens // multiple) * multiple


def _cp_tokens(length: int, cp: int, rank: int) -> Integers:
    if cp == 1:
        return np.arange(length, dtype=np.int64)
    chunks = np.arange(length, dtype=np.int64).reshape(2 * cp, -1)
    return np.concatenate([chunks[rank], chunks[2 * cp - 1 - rank]])


# -- who computes what -------------------------------------------------------------------------------------------


def split_evenly(num_items: int, num_lanes: int) -> tuple[range, ...]:
    """Contiguous blocks whose sizes differ by at most one."""
    edges = [lane * num_items // num_lanes for lane in range(num_lanes + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(edges))


def item_costs(module: ModuleConfig, tokens: Integers) -> Integers:
    """Relative cost of items of so many tokens: matrix products grow with them, attention with their square."""
    groups = module.num_query_groups or module.num_heads
    kv_size = module.hidden_size * groups // module.num_heads
    experts = module.moe_top_k if module.num_experts else 1
    mlp = experts * module.ffn_hidden_size * (3 if module.gated else 2)
    per_token = module.hidden_size * (2 * module.hidden_size + 2 * kv_size + mlp)
    return tokens * per_token + tokens**2 * (module.hidden_size if module.causal else 2 * module.hidden_size)


def balance_items(costs: Integers, preferred: Sequence[Sequence[int]], num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """Items per lane, ascending: nearly the least possible load of the busiest lane, and few items moved.

    Longest processing time first (Graham 1969: at most 4/3 - 1/(3*lanes) of the optimum) says what load is reachable;
    then each item stays on a lane it prefers (near the rank that owns its sample) while this load is kept, and the
    others fill up the rest.
    """
    by_cost = sorted(range(len(costs)), key=lambda i: (-int(costs[i]), i))
    shortest = _fill([0] * num_lanes, by_cost, costs)
    limit = max(_loads(shortest, costs))
    kept: list[list[int]] = [[] for _ in range(num_lanes)]
    loads, moved = [0] * num_lanes, []
    for item in by_cost:
        lane = min(preferred[item], key=lambda lane: loads[lane])
        if loads[lane] + int(costs[item]) <= limit:
            kept[lane].append(item)
            loads[lane] += int(costs[item])
        else:
            moved.append(item)
    for lane, items in enumerate(_fill(loads, moved, costs)):
        kept[lane].extend(items)
    chosen = kept if max(_loads(kept, costs)) <= limit else shortest
    return tuple(tuple(sorted(items)) for items in chosen)


def _fill(loads: Sequence[int], order: Sequence[int], costs: Integers) -> list[list[int]]:
    """Each item in turn to the lane with the least load."""
    lanes: list[list[int]] = [[] for _ in loads]
    heap = [(load, lane) for lane, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in order:
        load, lane = heap[0]
        lanes[lane].append(item)
        heapq.heapreplace(heap, (load + int(costs[item]), lane))
    return lanes


def _loads(lanes: Sequence[Sequence[int]], costs: Integers) -> list[int]:
    cost_of: list[int] = costs.tolist()  # few items a lane: faster than numpy
    return [sum(cost_of[item] for item in items) for items in lanes]


def max_load(lanes: Sequence[Sequence[int]], costs: Integers) -> int:
    """Cost of the busiest lane."""
    return max(_loads(lanes, costs))


def imbalance(lanes: Sequence[Sequence[int]], costs: Integers) -> float:
    """Load of the busiest lane over the mean load; 1 is perfect (and what an empty unit has)."""
    loads = _loads(lanes, costs)
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0
