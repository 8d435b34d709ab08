"""Routes between two sides of lanes: complete, minimal, spread out, and the other way round the transpose."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.parallel_state_ext.routes import build_route

WORLD_SIZE = 8


@st.composite
def sides(draw: st.DrawFn, num_items: int):
    """Lanes of some ranks, tp replicas each, that deal `num_items` items out in any way (empty lanes included)."""
    tp = draw(st.integers(1, 4))
    dp = draw(st.integers(1, WORLD_SIZE // tp))
    ranks = draw(st.permutations(range(WORLD_SIZE)))
    lane_of = draw(st.lists(st.integers(0, dp - 1), min_size=num_items, max_size=num_items))
    order = draw(st.permutations(range(num_items)))
    return [(ranks[lane * tp : (lane + 1) * tp], [i for i in order if lane_of[i] == lane]) for lane in range(dp)]


@st.composite
def borders(draw: st.DrawFn):
    num_items = draw(st.integers(0, 10))
    return draw(sides(num_items)), draw(sides(num_items))


def lane_map(source, target, replica: int) -> np.ndarray:
    """0/1 matrix [target slots, source slots] of what reaches the given tp replica of every target lane."""
    slot = [{}, {}]
    for side, lanes in enumerate((source, target)):
        for lane, (_, items) in enumerate(lanes):
            for position in range(len(items)):
                slot[side][lane, position] = len(slot[side])
    lane_of_sender = {rank: lane for lane, (ranks, _) in enumerate(source) for rank in ranks}
    matrix = np.zeros((len(slot[1]), len(slot[0])), dtype=int)
    for transfer in build_route(source, target):
        for lane, (ranks, _) in enumerate(target):
            if transfer.receiver == ranks[replica]:
                for here, there in zip(transfer.from_positions, transfer.to_positions, strict=True):
                    matrix[slot[1][lane, there], slot[0][lane_of_sender[transfer.sender], here]] += 1
    return matrix


def test_table_of_a_small_border() -> None:
    """By hand: rank 2 keeps item 2; replica 1 of a target lane (ranks 4 and 6) reads from replica 1 of the sources."""
    source = [((0, 1), (0, 1)), ((2, 3), (2, 3))]
    target = [((2, 4), (0, 1, 2)), ((5, 6), (3,))]
    assert [(t.sender, t.receiver, t.items, t.from_positions, t.to_positions) for t in build_route(source, target)] == [
        (0, 2, (0, 1), (0, 1), (0, 1)),
        (2, 2, (2,), (0,), (2,)),
        (1, 4, (0, 1), (0, 1), (0, 1)),
        (3, 4, (2,), (0,), (2,)),
        (2, 5, (3,), (1,), (0,)),
        (3, 6, (3,), (1,), (0,)),
    ]


@given(borders())
def test_each_target_rank_gets_each_of_its_items_once_and_in_its_place(border) -> None:
    source, target = border
    got = {rank: {} for ranks, _ in target for rank in ranks}
    for transfer in build_route(source, target):
        for item, position in zip(transfer.items, transfer.to_positions, strict=True):
            assert position not in got[transfer.receiver]
            got[transfer.receiver][position] = item
    for ranks, items in target:
        for rank in ranks:
            assert got[rank] == dict(enumerate(items))


@given(borders())
def test_senders_hold_what_they_send(border) -> None:
    source, target = border
    held = {rank: items for ranks, items in source for rank in ranks}
    for transfer in build_route(source, target):
        assert [held[transfer.sender][position] for position in transfer.from_positions] == list(transfer.items)


@given(borders())
def test_no_item_travels_that_is_already_there(border) -> None:
    """The lower bound by counting: a rank has to be sent every item that it needs and does not hold, once."""
    source, target = border
    held = {rank: set(items) for ranks, items in source for rank in ranks}
    missing = Counter()
    for ranks, items in target:
        for rank in ranks:
            missing.update((rank, item) for item in items if item not in held.get(rank, ()))
    sent = Counter()
    for transfer in build_route(source, target):
        if not transfer.is_local:
            sent.update((transfer.receiver, item) for item in transfer.items)
    assert sent == missing


@given(borders())
def test_at_most_one_message_between_two_ranks(border) -> None:
    pairs = Counter((t.sender, t.receiver) for t in build_route(*border))
    assert all(count == 1 for count in pairs.values())


@given(borders())
def test_traffic_spreads_over_the_replicas_of_a_source_lane(border) -> None:
    """Of R readers that all have to be sent something, no one of T replicas serves more than ceil(R / T)."""
    source, target = border
    holders = {rank for ranks, _ in source for rank in ranks}
    route = build_route(source, target)
    for ranks, _ in target:
        if not holders & set(ranks):
            for senders, _ in source:
                served = Counter(t.sender for t in route if t.receiver in ranks and t.sender in senders)
                assert max(served.values(), default=0) <= -(-len(ranks) // len(senders))


@given(borders())
def test_the_other_way_round_is_the_adjoint(border) -> None:
    """As a linear map between lanes, backward is the transpose of forward, for every replica that reads."""
    source, target = border
    forwards = [lane_map(source, target, replica) for replica in range(len(target[0][0]))]
    backwards = [lane_map(target, source, replica) for replica in range(len(source[0][0]))]
    for forward in forwards:
        for backward in backwards:
            np.testing.assert_array_equal(backward, forward.T)
    assert forwards[0].sum() == sum(len(items) for _, items in target)


def test_an_item_that_nobody_holds_is_refused() -> None:
    with pytest.raises(KeyError):
        build_route([((0,), (0,))], [((1,), (0, 1))])
