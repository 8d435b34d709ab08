"""Which slot computes which item, and which tokens a rank holds: complete, balanced, the same for all observers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.parallel_state_ext.boundaries.balance import (
    Slots,
    balance_items,
    item_costs,
    least_load,
    split_evenly,
)
from megatron_mosaic.parallel_state_ext.boundaries.items import integers, padded_length, shard_of
from megatron_mosaic.plan import Layout, ModulePlan, RankSet
from tests.cases import GENERATOR, LLM, VISION

costs_of_items = st.lists(st.integers(0, 50), max_size=12).map(integers)


def placed(**layout):
    made = Layout(**layout)
    return ModulePlan(ranks=RankSet.of(range(made.num_ranks)), layout=made)


@given(costs_of_items, st.integers(1, 5), st.data())
def test_every_item_has_one_slot(costs, num_slots, data):
    preferred = [data.draw(st.lists(st.integers(0, num_slots - 1), min_size=1, max_size=3)) for _ in costs]
    slots = balance_items(costs, preferred, num_slots)
    assert sorted(np.concatenate(list(slots))) == list(range(len(costs)))
    assert all(list(slot) == sorted(slot) for slot in slots) and len(slots) == num_slots
    assert all((slots.of_item[slot] == number).all() for number, slot in enumerate(slots))
    assert all(slots.index_in_slot[slot].tolist() == list(range(len(slot))) for slot in slots)
    assert slots.max_load(costs) == max(int(costs[slot].sum()) for slot in slots)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7).map(integers), st.integers(1, 3))
def test_the_busiest_slot_is_near_the_optimum(costs, num_slots):
    """The oracle tries all assignments; Graham's bound for longest processing time first is 4/3 - 1/(3 slots)."""
    best = min(
        max(int(costs[[slot == d for slot in slots]].sum()) for d in range(num_slots))
        for slots in itertools.product(range(num_slots), repeat=len(costs))
    )
    found = balance_items(costs, [[0]] * len(costs), num_slots)
    busiest = found.max_load(costs)
    assert least_load(costs, num_slots) <= best <= busiest <= best * (4 / 3 - 1 / (3 * num_slots)) + 1e-9


def test_items_stay_where_they_are_wanted_if_that_costs_nothing():
    same = integers([5] * 6)
    assert balance_items(same, [[1], [0], [1], [0], [1], [0]], 2).of_item.tolist() == [1, 0, 1, 0, 1, 0]
    assert balance_items(same, [[0]] * 6, 2).of_item.tolist() == [0, 0, 0, 1, 1, 1]
    assert balance_items(integers([9, 1, 1, 1]), [[0], [0], [0], [0]], 2).of_item.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("module", [VISION, LLM, GENERATOR])
def test_costs_are_in_proportion_to_flops(module):
    """2 per multiply-add of a matrix, 4*s*s*h for attention, half of it if causal."""
    h, f, tokens = module.hidden_size, module.ffn_hidden_size, 37
    flops = 2 * tokens * (4 * h * h + 2 * h * f) + 4 * tokens**2 * h * (0.5 if module.causal else 1)
    assert 2 * int(item_costs(module, integers([tokens]))[0]) == flops


def test_tokens_of_a_rank_by_hand():
    """cp 2: chunks 0 1 2 3 of 8 tokens, rank 0 has the outer ones; sequence parallelism halves them again."""
    plain = ModulePlan(ranks=RankSet.of(range(4)), layout=Layout(tp=2, cp=2), sequence_parallel=True)
    outer = shard_of(plain, (0, 1), integers([8, 5]), cp=0, tp=1)
    assert (outer.length, outer.cp_tokens.tolist(), outer.tokens.tolist()) == (8, [0, 1, 6, 7], [6, 7])
    inner = shard_of(plain, (0, 1), integers([8, 5]), cp=1, tp=0)
    assert (inner.cp_tokens.tolist(), inner.tokens.tolist()) == ([2, 3, 4, 5], [2, 3])


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(1, 40))
def test_ranks_split_the_padded_tokens(tp, cp, split, tokens):
    plan = ModulePlan(ranks=RankSet.of(range(tp * cp)), layout=Layout(tp=tp, cp=cp), sequence_parallel=split and tp > 1)
    shards = [shard_of(plan, (0,), integers([tokens]), cp=c, tp=t) for c in range(cp) for t in range(tp)]
    held = np.sort(np.concatenate([shard.tokens for shard in shards])).tolist()
    copies = 1 if plan.sequence_parallel else tp
    assert held == sorted(list(range(padded_length(plan, tokens))) * copies)
    assert len({len(shard.tokens) for shard in shards}) == 1
    assert 0 <= padded_length(plan, tokens) - tokens < 2 * cp * tp


@given(st.integers(0, 50), st.integers(1, 9))
def test_split_evenly(num_items, num_slots) -> None:
    blocks = split_evenly(num_items, num_slots)
    assert np.concatenate(list(blocks)).tolist() == list(range(num_items))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    again = Slots.of(blocks.of_item, num_slots)
    assert (again.order == blocks.order).all() and (again.starts == blocks.starts).all()
