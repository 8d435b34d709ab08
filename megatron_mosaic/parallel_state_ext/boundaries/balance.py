"""Items shared out over a module's data-parallel slots: in blocks, or balanced by cost. Pure integers."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, integers
from megatron_mosaic.plan.workload import ModuleConfig


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Which slot computes each item of a unit."""

    of_item: Integers
    order: Integers = field(repr=False)  # items slot by slot, ascending within each
    starts: Integers = field(repr=False)  # slot d computes order[starts[d] : starts[d + 1]]

    @classmethod
    def of(cls, slot_of_item: Integers, num_slots: int) -> Slots:
        """The slots 0 .. num_slots - 1, some of them empty."""
        order = np.argsort(slot_of_item, kind="stable")
        return cls(slot_of_item, order, np.searchsorted(slot_of_item[order], np.arange(num_slots + 1)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Integers]:
        return (self[slot] for slot in range(len(self)))

    def __getitem__(self, slot: int) -> Integers:
        return self.order[self.starts[slot] : self.starts[slot + 1]]

    @property
    def index_in_slot(self) -> Integers:
        """The number of every item within its slot."""
        index = np.empty_like(self.of_item)
        index[self.order] = np.arange(len(self.order)) - self.starts[self.of_item[self.order]]
        return index

    def max_load(self, costs: Integers) -> int:
        """Cost of the busiest slot."""
        loads = np.zeros(len(self), dtype=np.int64)
        np.add.at(loads, self.of_item, costs)
        return int(loads.max())


def split_evenly(num_items: int, num_slots: int) -> Slots:
    """Contiguous blocks whose sizes differ by at most one."""
    starts = np.arange(num_slots + 1) * num_items // num_slots
    return Slots(np.arange(num_slots).repeat(starts[1:] - starts[:-1]), np.arange(num_items), starts)


def item_costs(module: ModuleConfig, tokens: Integers) -> Integers:
    """Relative cost of items of so many tokens: matrix products grow with them, attention with their square."""
    groups = module.num_query_groups or module.num_heads
    kv_size = module.hidden_size * groups // module.num_heads
    experts = module.moe_top_k if module.num_experts else 1
    mlp = experts * module.ffn_hidden_size * (3 if module.gated else 2)
    per_token = module.hidden_size * (2 * module.hidden_size + 2 * kv_size + mlp)
    return tokens * per_token + tokens**2 * (module.hidden_size if module.causal else 2 * module.hidden_size)


def least_load(costs: Integers, num_slots: int) -> int:
    """What the busiest slot computes at least, however items are shared out."""
    return max(int(costs.max()), -(-int(costs.sum()) // num_slots)) if len(costs) else 0


def balance_items(costs: Integers, preferred: Sequence[Sequence[int]], num_slots: int) -> Slots:
    """Nearly the least possible load of the busiest slot, and few items moved.

    Longest processing time first (Graham 1969: at most 4/3 - 1/(3*slots) of the optimum) says what load is reachable;
    then each item stays on a slot it prefers (near the rank that owns its sample) while this load is kept, and the
    others fill up the rest.
    """
    cost_of: list[int] = costs.tolist()  # item by item: faster than numpy
    by_cost = sorted(range(len(cost_of)), key=lambda item: -cost_of[item])
    shortest = [0] * len(cost_of)
    limit = _fill(shortest, [0] * num_slots, by_cost, cost_of)
    kept, loads, moved = [0] * len(cost_of), [0] * num_slots, []
    for item in by_cost:
        slot = min(preferred[item], key=loads.__getitem__)
        if loads[slot] + cost_of[item] <= limit:
            kept[item] = slot
            loads[slot] += cost_of[item]
        else:
            moved.append(item)
    chosen = kept if _fill(kept, loads, moved, cost_of) <= limit else shortest
    return Slots.of(integers(chosen), num_slots)


def _fill(slot_of_item: list[int], loads: Sequence[int], order: Sequence[int], costs: Sequence[int]) -> int:
    """Each item in turn to the slot with the least load. Returns the largest load."""
    heap = [(load, slot) for slot, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in order:
        load, slot = heap[0]
        slot_of_item[item] = slot
        heapq.heapreplace(heap, (load + costs[item], slot))
    return max(heap)[0]
