"""RowChannels over four gloo ranks: many borders in one world, against plain indexing of the whole tensor.

The oracle is indexing: item i's rows are rows[i], wherever they travelled. Values are small integers, so that sums in
the adjoint identity are exact.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.batch import split_evenly
from megatron_mosaic.parallel_state_ext.boundary import RowChannel
from megatron_mosaic.parallel_state_ext.routes import build_route
from tests.forked import run_gloo

pytestmark = pytest.mark.dist

ROWS_PER_ITEM, WIDTH = 3, 5
ITEM_BYTES = ROWS_PER_ITEM * WIDTH * 4


def dealt(lanes, *sizes):
    """Lanes with so many consecutive items each."""
    items = iter(range(sum(sizes)))
    return [(ranks, [next(items) for _ in range(size)]) for ranks, size in zip(lanes, sizes, strict=True)]


def even(lanes, num_items):
    return [(ranks, list(block)) for ranks, block in zip(lanes, split_evenly(num_items, len(lanes)), strict=True)]


FOUR = [(0,), (1,), (2,), (3,)]
PAIRS = [(0, 1), (2, 3)]
BORDERS = {
    "equal": (even(FOUR, 7), even(FOUR, 7)),
    "equal ranks, other shares": (dealt(FOUR, 3, 0, 3, 1), even(FOUR, 7)),
    "dp 4 to tp 2 dp 2": (even(FOUR, 6), dealt(PAIRS, 5, 1)),
    "disjoint": (even([(0,), (1,)], 5), even([(2,), (3,)], 5)),
    "disjoint, tp to tp": (even([(0, 1)], 4), even([(2, 3)], 4)),
    "nested": (even([(1,), (2,)], 5), even(FOUR, 5)),
    "partial overlap": (even([(0,), (1,), (2,)], 8), even([(1, 2), (3, 0)], 8)),
    "dp 3 to dp 2": (even([(0,), (1,), (2,)], 7), dealt([(0,), (3,)], 2, 5)),
    "scattered replicas": (even([(0, 2)], 3), even([(1, 3)], 3)),
    "one to four replicas": (even([(2,)], 3), even([(0, 1, 2, 3)], 3)),
    "items in another order": ([((0,), [3, 0]), ((1,), [2, 4, 1])], [((1,), [1, 3]), ((2,), [4, 0, 2])]),
    "two items to many lanes": (even(FOUR, 2), even([(3,), (2,), (1,)], 2)),
    "nothing": (even(FOUR, 0), even(PAIRS, 0)),
}


def lower_bound(source, target) -> int:
    """Item copies that no route can avoid: what a target rank needs and does not hold."""
    held = {rank: set(items) for ranks, items in source for rank in ranks}
    return sum(len(set(items) - held.get(rank, set())) for ranks, items in target for rank in ranks)


def lane_of(rank, side):
    """(this rank's items, whether it speaks for its lane); None if it has no lane with items."""
    for ranks, items in side:
        if rank in ranks and items:
            return items, rank == ranks[0]
    return None


def integers(num_items, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (num_items, ROWS_PER_ITEM, WIDTH), generator=generator).float()


def summed(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def make_channel(group) -> RowChannel:
    return RowChannel(group, rows_per_item=ROWS_PER_ITEM, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))


def pass_over(channel, source, target, messages) -> list[torch.Tensor]:
    """Send all messages, then receive them; per message what this rank's target lane got, as items."""
    rank, route = dist.get_rank(), build_route(source, target)
    if (sends := lane_of(rank, source)) is not None:
        for key, rows in enumerate(messages):
            channel.send(key, route, rows[sends[0]].flatten(0, 1))
    got = []
    if (reads := lane_of(rank, target)) is not None:
        got = [channel.receive(key, route, len(reads[0])) for key in range(len(messages))]
    channel.drain()
    for rows, expected in zip(got, messages, strict=False):
        assert rows.shape == (len(reads[0]) * ROWS_PER_ITEM, WIDTH)
        torch.testing.assert_close(rows.unflatten(0, (-1, ROWS_PER_ITEM)), expected[reads[0]], rtol=0, atol=0)
    return got


def inner_product(rank, side, got, others) -> float:
    """<got, others> over the lanes of a side, each lane once."""
    lane = lane_of(rank, side)
    if lane is None or not lane[1]:
        return 0.0
    return float((got[0].flatten().double() * others[lane[0]].flatten().double()).sum())


def check_all_borders() -> None:
    rank = dist.get_rank()
    forward, backward = make_channel(dist.new_group()), make_channel(dist.new_group())
    for number, (name, (source, target)) in enumerate(BORDERS.items()):
        num_items = sum(len(items) for _, items in source)
        x, y = ([integers(num_items, seed) for seed in (10 * number + i, 10 * number + i + 5)] for i in (0, 1))
        before = forward.sent_bytes, backward.sent_bytes
        ax = pass_over(forward, source, target, x)
        aty = pass_over(backward, target, source, y)
        left = summed(inner_product(rank, target, ax, y[0]))
        right = summed(inner_product(rank, source, aty, x[0]))
        assert left == right, f"{name}: <Ax, y> = {left}, <x, A^T y> = {right}"
        assert left or not num_items, f"{name}: a test of zeros"
        sent = [summed(channel.sent_bytes - was) for channel, was in zip((forward, backward), before, strict=True)]
        least = [2 * lower_bound(*sides) * ITEM_BYTES for sides in ((source, target), (target, source))]
        assert sent == least, f"{name}: sent {sent} bytes, at least {least}"


def test_rows_arrive_where_indexing_says_and_backward_is_the_adjoint() -> None:
    run_gloo(4, check_all_borders)


def leave_rows_behind() -> None:
    channel = make_channel(dist.group.WORLD)
    route = build_route([((0,), (0,))], [((0,), (0,))])
    channel.send("unit 3", route, torch.zeros(ROWS_PER_ITEM, WIDTH))
    with pytest.raises(AssertionError, match="unit 3"):
        channel.drain()


def test_rows_that_nobody_takes_are_an_error() -> None:
    run_gloo(1, leave_rows_behind)
