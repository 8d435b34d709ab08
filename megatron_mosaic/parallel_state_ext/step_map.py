"""Who holds what in one step: items of units, shards of tokens, rows of edges, seen from one rank. Pure integers.

    metadata of every microbatch (items, links) --balance--> lanes of every unit --locate--> own rows, messages

A *unit* of a module covers `units[module]` microbatches, so a module may work on several of the backbone's at once.
Rows of an edge are ordered by microbatch, then link, then position in the link, on both sides.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mosaic.batch import Integers, Items, Links, Shard, expand
from megatron_mosaic.parallel_state_ext.lanes import UnitLanes
from megatron_mosaic.parallel_state_ext.ranks import Coordinates, coordinates_of
from megatron_mosaic.parallel_state_ext.routes import Part, Side, incoming, outgoing
from megatron_mosaic.plan import Plan
from megatron_mosaic.workload import Edge, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is known of one microbatch before any tensor is touched."""

    items: Mapping[str, Items]
    links: Mapping[tuple[str, str], Links]

    @property
    def digest(self) -> bytes:
        """The same for microbatches whose arrays are the same."""
        found = hashlib.blake2b(digest_size=16)
        columns: list[tuple[str, tuple[Integers, ...]]] = [
            (name, (items.samples, items.tokens)) for name, items in sorted(self.items.items())
        ]
        for edge, links in sorted(self.links.items()):
            starts = (links.source_starts, links.target_starts)
            columns.append((" ".join(edge), (links.source_items, links.target_items, *starts, links.rows)))
        for name, arrays in columns:
            found.update(f"{name} {len(arrays[0])};".encode())
            for array in arrays:
                found.update(np.ascontiguousarray(array))
        return found.digest()


class RouteCache:
    """What follows from microbatches' metadata alone, kept for steps that bring the same shapes. One per rank and plan.

    Oldest entries beyond `capacity` go when a step begins, never within one.
    """

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._found)

    def trim(self) -> None:
        """Forget what was not used for longest."""
        while len(self._found) > self._capacity:
            self._found.popitem(last=False)

    def find[T](self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value under `key`, computed if it is not there."""
        if key in self._found:
            self.hits += 1
            self._found.move_to_end(key)
        else:
            self.misses += 1
            self._found[key] = compute()
        value: T = self._found[key]
        return value


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows of an edge that this rank holds on one side of a unit: where they stand, and who holds them opposite.

    `first[i]` is the row number at which the i-th microbatch of the unit begins.
    """

    tokens: Integers
    items: Integers
    opposite: Integers  # group on the other side
    first: Integers

    def __len__(self) -> int:
        return len(self.tokens)


class StepMap:
    """One step as `rank` sees it. Every rank computes its own from the same metadata."""

    def __init__(
        self,
        plan: Plan,
        workload: Workload,
        rank: int,
        microbatches: Sequence[Metadata],
        cache: RouteCache | None = None,
    ) -> None:
        """`cache`: of this plan, workload and rank; shared by all steps."""
        self._plan, self._workload, self._rank = plan, workload, rank
        self._microbatches = microbatches
        self._digests = [microbatch.digest for microbatch in microbatches]
        self._cache = RouteCache() if cache is None else cache
        self._cache.trim()
        self._at: dict[str, Coordinates] = {
            name: coordinates_of(plan.modules[name], rank) for name in plan.modules_on(rank)
        }
        self._units: dict[tuple[str, int], UnitLanes] = {}  # of this step
        self._shards: dict[tuple[str, int], Shard] = {}
        self._keys: dict[tuple[str, str, int, bool], tuple[Hashable, ...]] = {}

    def covered(self, module: str, unit: int) -> range:
        """The microbatches of a unit."""
        size = self._plan.modules[module].unit or 1
        return range(unit * size, min((unit + 1) * size, len(self._microbatches)))

    def shard(self, module: str, unit: int) -> Shard:
        """What this rank computes. No items: the unit is empty here."""
        if (module, unit) not in self._shards:
            at = self._at[module]
            self._shards[module, unit] = self._unit(module, unit).shard(at.dp, at)
        return self._shards[module, unit]

    def is_ghost(self, module: str, unit: int) -> bool:
        """Whether this rank computes an item that counts for nothing.

        Experts on other ranks wait for every lane: a lane without items sends them those of the unit's first.
        """
        found = self._unit(module, unit)
        return found.is_ghost(self._at[module].dp)

    def imbalance(self, module: str, unit: int) -> tuple[float, float]:
        """Load of the busiest lane over the mean: if owners computed their items themselves, and as it is."""
        return self._unit(module, unit).imbalance

    def rows(self, edge: Edge, unit: int, *, at_source: bool) -> HeldRows:
        """The edge's rows that this rank holds in a unit of its source (or target)."""
        key = ("rows", *self._key(edge, unit, at_source))
        return self._cache.find(key, lambda: self._find_rows(edge, unit, at_source))

    def peers(self, edge: Edge, unit: int, *, at_source: bool) -> range:
        """The units on the other side that share microbatches with this one."""
        module, other = (edge.source, edge.target) if at_source else (edge.target, edge.source)
        covered, size = self.covered(module, unit), self._plan.modules[other].unit or 1
        return range(covered[0] // size, covered[-1] // size + 1)

    def sends(self, edge: Edge, unit: int, peer: int, *, at_source: bool) -> tuple[Part, ...]:
        """This rank's rows of `unit` that go to other ranks for their unit `peer`; forward if `at_source`."""
        key = ("sends", self._offset(edge, unit, peer, at_source), *self._key(edge, unit, at_source))
        return self._cache.find(key, lambda: self._find_sends(edge, unit, peer, at_source))

    def receives(self, edge: Edge, unit: int, peer: int, *, at_source: bool) -> tuple[Part, ...]:
        """This rank's rows of `unit` that come from the other side's unit `peer`; backward if `at_source`."""
        key = ("receives", self._offset(edge, unit, peer, at_source), *self._key(edge, unit, at_source))
        return self._cache.find(key, lambda: self._find_receives(edge, unit, peer, at_source))

    # -- inside --------------------------------------------------------------------------------------------------

    def _key(self, edge: Edge, unit: int, at_source: bool) -> tuple[Hashable, ...]:
        """All that rows and messages of a unit depend on: its microbatches, and all others of the units opposite."""
        asked = (edge.source, edge.target, unit, at_source)
        if asked in self._keys:
            return self._keys[asked]
        module, other = (edge.source, edge.target) if at_source else (edge.target, edge.source)
        own, peers = self.covered(module, unit), self.peers(edge, unit, at_source=at_source)
        start, stop = self.covered(other, peers[0]).start, self.covered(other, peers[-1]).stop
        start, stop = min(start, own.start), max(stop, own.stop)
        place = (own.start - start, len(own), self.covered(other, peers[0]).start - start)
        self._keys[asked] = (edge.source, edge.target, at_source, place, *self._digests[start:stop])
        return self._keys[asked]

    def _offset(self, edge: Edge, unit: int, peer: int, at_source: bool) -> int:
        return peer - self.peers(edge, unit, at_source=at_source)[0]

    def _find_sends(self, edge: Edge, unit: int, peer: int, at_source: bool) -> tuple[Part, ...]:
        held, rows = self._shared(edge, unit, peer, at_source)
        own, other = self._sides(edge, unit, peer, at_source)
        group, _ = own.group_of(self._at[edge.source if at_source else edge.target])
        return outgoing(self._rank, own.ranks_of(group), other, held.opposite[rows], rows.start)

    def _find_receives(self, edge: Edge, unit: int, peer: int, at_source: bool) -> tuple[Part, ...]:
        held, rows = self._shared(edge, unit, peer, at_source)
        own, other = self._sides(edge, unit, peer, at_source)
        group, replica = own.group_of(self._at[edge.source if at_source else edge.target])
        return incoming(self._rank, group, replica, other, held.opposite[rows], rows.start)

    def _unit(self, module: str, unit: int) -> UnitLanes:
        if (module, unit) not in self._units:
            covered = self.covered(module, unit)
            key = ("unit", module, *self._digests[covered.start : covered.stop])
            items = [self._microbatches[m].items for m in covered]
            found = self._cache.find(key, lambda: UnitLanes(self._plan, self._workload, module, items))
            self._units[module, unit] = found
        return self._units[module, unit]

    def _side(self, edge: Edge, unit: int, *, at_source: bool) -> Side:
        found = self._unit(edge.source if at_source else edge.target, unit)
        return found.last if at_source else found.first

    def _sides(self, edge: Edge, unit: int, peer: int, at_source: bool) -> tuple[Side, Side]:
        return self._side(edge, unit, at_source=at_source), self._side(edge, peer, at_source=not at_source)

    def _shared(self, edge: Edge, unit: int, peer: int, at_source: bool) -> tuple[HeldRows, slice]:
        """This unit's rows, and which of them belong to microbatches of `peer` too."""
        module, other = (edge.source, edge.target) if at_source else (edge.target, edge.source)
        held, covered, peers = (
            self.rows(edge, unit, at_source=at_source),
            self.covered(module, unit),
            self.covered(other, peer),
        )
        low, high = max(covered.start, peers.start), min(covered.stop, peers.stop)
        return held, slice(int(held.first[low - covered.start]), int(held.first[high - covered.start]))

    def _find_rows(self, edge: Edge, unit: int, at_source: bool) -> HeldRows:
        module, other = (edge.source, edge.target) if at_source else (edge.target, edge.source)
        at = self._at[module]
        found = self._unit(module, unit)
        own = self._side(edge, unit, at_source=at_source)
        mine, _ = own.group_of(at)
        columns: list[list[Integers]] = [[], [], []]
        first = [0]
        for index, m in enumerate(self.covered(module, unit)):
            links = self._microbatches[m].links[edge.source, edge.target]
            ends = [(links.source_items, links.source_starts), (links.target_items, links.target_starts)]
            (items, starts), (far_items, far_starts) = ends if at_source else reversed(ends)
            items = items + found.offsets[index]
            near = np.flatnonzero(own.lane_of_item[items] == at.dp) if len(items) else items
            link, within = expand(links.rows[near])
            rows = near[link]
            group, token, item = own.locate(items[rows], starts[rows] + within)
            kept = group == mine
            size = self._plan.modules[other].unit or 1
            opposite = self._unit(other, m // size)
            far = far_items[rows][kept] + opposite.offsets[m - (m // size) * size]
            side = self._side(edge, m // size, at_source=not at_source)
            columns[0].append(token[kept])
            columns[1].append(item[kept])
            columns[2].append(side.locate(far, (far_starts[rows] + within)[kept])[0])
            first.append(first[-1] + int(kept.sum()))
        tokens, row_items, groups = (np.concatenate(column) for column in columns)
        return HeldRows(tokens, row_items, groups, np.array(first, dtype=np.int64))
