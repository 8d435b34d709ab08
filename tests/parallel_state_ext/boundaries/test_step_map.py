"""Random workloads under random plans: rows arrive where their token is, once, and their gradients return.

All ranks are simulated in this process; messages are queues per pair of ranks, first in, first out. The oracle is the
links themselves: a row is worth a number made of its source item and token, and must be found at its target's.
"""

from collections import defaultdict, deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, RouteCache, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.worlds import BACKBONE, bring_items, module, plans, workloads


@st.composite
def steps(draw):
    """(plan, workload, metadata of a step)."""
    workload = draw(workloads())
    plan = draw(plans(workload))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = plan.micro_batch_size * plan.modules[BACKBONE].layout.dp
    return plan, workload, [bring_items(workload, size, rng) for _ in range(plan.num_microbatches(BACKBONE))]


def ranks_of(plan, end):
    """The ranks on whose stage rows leave, or arrive."""
    placed = plan.modules[end.module]
    return placed.stage_ranks(placed.layout.pp - 1 if end.is_source else 0).ranks


def map_of(plan, workload, rank, metadata, cache=None):
    return StepMap(PlanMap(RankView.of(plan, rank, workload.edges), workload, cache), metadata)


def units_of(plan, name, num_microbatches):
    return range(-(-num_microbatches // (plan.modules[name].unit or 1)))


def value_of(metadata, maps, name, unit, item, token):
    """A number for token `token` of item `item` of a unit: unique over the step."""
    offset = 0
    for m in maps.covered(name, unit):
        count = len(metadata[m].items[name])
        if item < offset + count:
            return (m * 1000 + item - offset) * 1000 + token
        offset += count
    raise AssertionError(item)


def held_values(metadata, maps, end, unit):
    """What this rank's rows are worth, by the numbers of their tokens at this end."""
    shard, rows = maps.shard(end.module, unit), maps.rows(end, unit)
    return np.array(
        [
            value_of(metadata, maps, end.module, unit, shard.items[item], int(shard.tokens[token]))
            for token, item in zip(rows.tokens, rows.items, strict=True)
        ],
        dtype=np.int64,
    )


def links_by_token(metadata, edge):
    """Value of a target token -> value of the source token that its row comes from."""
    table = {}
    for m, microbatch in enumerate(metadata):
        links = microbatch.links[edge.source, edge.target]
        for k in range(len(links)):
            for row in range(int(links.rows[k])):
                target = (m * 1000 + int(links.target_items[k])) * 1000 + int(links.target_starts[k]) + row
                source = (m * 1000 + int(links.source_items[k])) * 1000 + int(links.source_starts[k]) + row
                assert target not in table
                table[target] = source
    return table


def deliver(plan, sender, maps, num_microbatches, values):
    """Send every row over simulated messages. Returns (rank, unit) -> received values, and rows sent to other ranks."""
    receiver = sender.opposite
    mail, sent = defaultdict(deque), 0
    for rank in ranks_of(plan, sender):
        for unit in units_of(plan, sender.module, num_microbatches):
            if not len(maps[rank].rows(sender, unit)):
                continue
            for peer in maps[rank].peers(sender, unit):
                for part in maps[rank].sends(sender, unit, peer):
                    mail[rank, part.rank, unit, peer].append(values[rank, unit][part.rows])
                    sent += part.num_rows * (part.rank != rank)
                    assert len(values[rank, unit][part.rows]) == part.num_rows
    received = {}
    for rank in ranks_of(plan, receiver):
        for unit in units_of(plan, receiver.module, num_microbatches):
            rows = np.full(len(maps[rank].rows(receiver, unit)), -1, dtype=np.int64)
            if len(rows):
                for peer in maps[rank].peers(receiver, unit):
                    for part in maps[rank].receives(receiver, unit, peer):
                        assert (rows[part.rows] == -1).all(), "a row came twice"
                        rows[part.rows] = mail[part.rank, rank, peer, unit].popleft()
            assert (rows >= 0).all(), "a row never came"
            received[rank, unit] = rows
    assert not any(mail.values()), "a message nobody took"
    return received, sent


@settings(max_examples=150)
@given(steps())
def test_rows_and_gradients_arrive_once_where_they_belong(step):
    plan, workload, metadata = step
    maps = {rank: map_of(plan, workload, rank, metadata) for rank in range(plan.world_size)}
    for edge in workload.edges:
        table = links_by_token(metadata, edge)
        source = EdgeEnd.source_of(edge)
        held = {
            end: {
                (rank, unit): held_values(metadata, maps[rank], end, unit)
                for rank in ranks_of(plan, end)
                for unit in units_of(plan, end.module, len(metadata))
            }
            for end in (source, source.opposite)
        }
        forward, sent = deliver(plan, source, maps, len(metadata), held[source])
        for place, rows in forward.items():
            assert rows.tolist() == [table[target] for target in held[source.opposite][place].tolist()]
        # Lower bound: each row once to each rank that needs it and does not hold it.
        at_home = defaultdict(set)
        for (rank, _), rows in held[source].items():
            at_home[rank] |= set(rows.tolist())
        remote = sum(
            table[target] not in at_home[rank]
            for (rank, _), rows in held[source.opposite].items()
            for target in rows.tolist()
        )
        assert sent == remote
        # Backward: the gradient of a row is worth the row's target; one link may be one of several of its source.
        backward, _ = deliver(plan, source.opposite, maps, len(metadata), held[source.opposite])
        for place, rows in backward.items():
            assert [table[target] for target in rows.tolist()] == held[source][place].tolist()


@settings(max_examples=100)
@given(steps())
def test_every_token_of_every_item_is_computed_once_per_replica(step):
    plan, workload, metadata = step
    maps = {rank: map_of(plan, workload, rank, metadata) for rank in range(plan.world_size)}
    for config in workload.modules:
        placed, seen = plan.modules[config.name], defaultdict(int)
        for rank in placed.stage_ranks(0).ranks:
            for unit in units_of(plan, config.name, len(metadata)):
                shard = maps[rank].shard(config.name, unit)
                if maps[rank].stands_in(config.name, unit):
                    continue  # counts for nothing
                for item in shard.items:
                    for token in shard.tokens.tolist():
                        seen[unit, item, token] += 1
        replicas = 1 if placed.sequence_parallel else placed.layout.tp
        assert set(seen.values()) <= {replicas}
        for unit in units_of(plan, config.name, len(metadata)):
            tokens = [t for m in maps[0].covered(config.name, unit) for t in metadata[m].items[config.name].tokens]
            assert all((unit, item, t) in seen for item, n in enumerate(tokens) for t in range(int(n)))


@settings(max_examples=50)
@given(steps())
def test_balancing_never_makes_a_slot_busier_than_owners_would(step):
    plan, workload, metadata = step
    for rank in range(plan.world_size):
        maps = map_of(plan, workload, rank, metadata)
        for name in plan.modules_on(rank):
            for unit in units_of(plan, name, len(metadata)):
                by_owner, balanced = maps.imbalance(name, unit)
                assert 1.0 <= balanced <= by_owner


def parts_of(plan, workload, maps, num_microbatches):
    """Everything that a step asks of its map, as plain values."""
    found = []
    for end in (end for edge in workload.edges for end in (EdgeEnd.source_of(edge), EdgeEnd.target_of(edge))):
        if end.module not in plan.modules_on(maps._rank):
            continue
        for unit in units_of(plan, end.module, num_microbatches):
            rows = maps.rows(end, unit)
            found.append([column.tolist() for column in (rows.tokens, rows.items, rows.opposite, rows.first)])
            for peer in maps.peers(end, unit):
                for ask in (maps.sends, maps.receives):
                    found.append([(part.rank, part.num_rows, str(part.rows)) for part in ask(end, unit, peer)])
    return found


@settings(max_examples=60)
@given(steps(), st.data())
def test_routes_of_earlier_steps_are_those_of_a_step_with_the_same_metadata(step, data):
    """Steps that mix two microbatches share one cache, of any size; the oracle is a map that remembers nothing."""
    plan, workload, metadata = step
    rank = data.draw(st.integers(0, plan.world_size - 1))
    cache = RouteCache(data.draw(st.sampled_from([0, 3, 512])))
    shared = PlanMap(RankView.of(plan, rank, workload.edges), workload, cache)
    for _ in range(3):
        mixed = [metadata[data.draw(st.integers(0, min(1, len(metadata) - 1)))] for _ in metadata]
        kept, fresh = StepMap(shared, mixed), map_of(plan, workload, rank, mixed)
        expected = parts_of(plan, workload, fresh, len(mixed))
        assert parts_of(plan, workload, kept, len(mixed)) == expected
        misses = cache.misses
        assert parts_of(plan, workload, kept, len(mixed)) == expected
        assert cache.misses == misses, "a route was computed twice in a step"


def test_a_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = RouteCache(capacity=2)
    assert [cache.find(key, lambda: len(cache)) for key in "abca"] == [0, 1, 2, 0]
    assert len(cache) == 3, "nothing goes within a step"
    cache.trim()
    assert (len(cache), cache.find("a", lambda: -1), cache.find("b", lambda: -1)) == (2, 0, -1)


def test_equal_items_are_shared_out_in_blocks() -> None:
    """So that a slot's rows are consecutive on the other side, and go and come without a copy."""
    config = [module("encoder0", Role.encoder), module(BACKBONE, Role.backbone)]
    edge = Edge(source="encoder0", target=BACKBONE, rows_per_item=4, width=8)
    placements = {"encoder0": Layout(dp=4), BACKBONE: Layout(tp=4)}
    modules = {name: ModulePlan(ranks=RankSet.parse("0-3"), layout=layout) for name, layout in placements.items()}
    plan = Plan(
        workload="random",
        world_size=4,
        global_batch_size=8,
        micro_batch_size=8,
        schedule=ScheduleChoice("1f1b"),
        modules=modules,
    )
    samples, tokens = np.arange(8), np.full(8, 4)
    items = {name: Items(samples, tokens) for name in modules}
    links = {("encoder0", BACKBONE): Links(samples, 0 * samples, samples, 0 * samples, tokens)}
    workload = Workload(name="random", modules=tuple(config), edges=(edge,))
    for rank in range(4):
        maps = map_of(plan, workload, rank, [Metadata(items=items, links=links)])
        assert maps.shard("encoder0", 0).items == (2 * rank, 2 * rank + 1)
        arriving = maps.receives(EdgeEnd.target_of(edge), 0, 0)
        assert [part.rows for part in arriving] == [slice(8 * slot, 8 * slot + 8) for slot in range(4)]


def test_imbalance_by_hand() -> None:
    """Images of equal cost, one of sample 0 and three of sample 1: 3 on the busier slot where the mean is 2."""
    encoder, backbone = module("encoder0", Role.encoder), module(BACKBONE, Role.backbone)
    modules = {
        "encoder0": ModulePlan(ranks=RankSet.parse("2-3"), layout=Layout(dp=2)),
        BACKBONE: ModulePlan(ranks=RankSet.parse("0-1"), layout=Layout(dp=2)),
    }
    plan = Plan(
        workload="random",
        world_size=4,
        global_batch_size=2,
        micro_batch_size=1,
        schedule=ScheduleChoice("1f1b"),
        modules=modules,
    )
    workload = Workload(name="random", modules=(encoder, backbone), edges=())
    items = {"encoder0": Items(np.array([0, 1, 1, 1]), np.full(4, 7)), BACKBONE: Items(np.arange(2), np.full(2, 9))}
    step = map_of(plan, workload, 2, [Metadata(items=items, links={})])
    assert step.imbalance("encoder0", 0) == (1.5, 1.0)
    assert step.imbalance(BACKBONE, 0) == (1.0, 1.0)
    empty = items | {"encoder0": Items(np.array([], dtype=np.int64), np.array([], dtype=np.int64))}
    assert map_of(plan, workload, 2, [Metadata(items=empty, links={})]).imbalance("encoder0", 0) == (1.0, 1.0)
