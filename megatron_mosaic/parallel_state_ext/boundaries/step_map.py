"""Who holds what in one step: items of units, shards of tokens, rows of edges, seen from one rank. Pure integers.

    metadata of every microbatch (items, links) --balance--> slots of every unit --locate--> own rows, messages

A *unit* of a module covers `units[module]` microbatches, so a module may work on several of the backbone's at once.
Rows of an edge are ordered by microbatch, then link, then position in the link, on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import mark
from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, Items, Links, Shard, expand
from megatron_mosaic.parallel_state_ext.boundaries.routes import Part, Side, blocks_of, incoming, outgoing
from megatron_mosaic.parallel_state_ext.boundaries.slots import SlotRule, UnitSlots
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is known of one microbatch before any tensor is touched.

    `content`: a fingerprint of its samples; empty where messages carry none.
    """

    items: Mapping[str, Items]
    links: Mapping[tuple[str, str], Links]
    content: bytes = b""

    def digest(self, part: str | tuple[str, str]) -> bytes:
        """Of a module's items, or of an edge's links: the same for microbatches in which they are the same."""
        found = hashlib.blake2b(digest_size=16)
        if isinstance(part, str):
            arrays: tuple[Integers, ...] = (self.items[part].samples, self.items[part].tokens)
        else:
            links = self.links[part]
            starts = (links.source_starts, links.target_starts)
            arrays = (links.source_items, links.target_items, *starts, links.rows)
        for array in arrays:  # all of one length
            found.update(np.ascontiguousarray(array))
        return found.digest()


class RouteCache:
    """What follows from microbatches' metadata alone, kept for steps that bring the same shapes. One per rank and plan.

    Oldest entries beyond `capacity` go when a step begins, never within one. `misses` counts what had to be computed.
    Lanes that run at the same time compute one after the other.
    """

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._found: dict[Hashable, list[Any]] = {}  # a value, and when it was last used
        self._uses = itertools.count()
        self._lock = threading.RLock()  # what is computed asks for its parts
        self.misses = 0

    def __len__(self) -> int:
        return len(self._found)

    def trim(self) -> None:
        """Forget what was not used for longest."""
        excess = len(self._found) - self._capacity
        for key in sorted(self._found, key=lambda key: self._found[key][1])[:excess] if excess > 0 else ():
            del self._found[key]

    def find[T](self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value under `key`, computed if it is not there."""
        entry = self._found.get(key)
        if entry is None:
            with self._lock:
                entry = self._found.get(key)  # another lane may have computed it meanwhile
                if entry is None:
                    self.misses += 1
                    entry = self._found[key] = [compute(), 0]
        entry[1] = next(self._uses)
        value: T = entry[0]
        return value


_NO_NUMBERS: Integers = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows of a unit that this rank holds at one end of an edge: where they stand, and who holds them opposite.

    `first[i]` is the row number at which the i-th microbatch of the unit begins.
    """

    tokens: Integers
    items: Integers
    opposite: Integers  # group at the other end
    numbers: Integers  # of each row among all of its edge and microbatch: the same at both ends; none if not marked
    first: Integers

    def __len__(self) -> int:
        return len(self.tokens)


class PlanMap:
    """What all steps of a plan share on one rank: its view, how items find their slots, routes of earlier steps."""

    def __init__(self, view: RankView, workload: Workload, cache: RouteCache | None = None) -> None:
        self.view, self.backbone = view, workload.backbone.name
        self.unit_sizes = view.plan.units(self.backbone)
        self.rules = {name: SlotRule(view.plan, workload, name) for name in view.plan.modules}
        self.cache = RouteCache() if cache is None else cache


class StepMap:
    """One step as a rank sees it. Every rank computes its own from the same metadata.

    `is_marked`: whether messages carry fingerprints.
    """

    def __init__(self, of_plan: PlanMap, microbatches: Sequence[Metadata]) -> None:
        self._rank, self._modules, self._unit_sizes = of_plan.view.rank, of_plan.view.modules, of_plan.unit_sizes
        self._backbone, self._rules, self._cache = of_plan.backbone, of_plan.rules, of_plan.cache
        self._microbatches, self.is_marked = microbatches, all(one.content for one in microbatches)
        self._cache.trim()
        self._digests: dict[tuple[str | tuple[str, str], int], bytes] = {}  # by part and microbatch
        self._units: dict[tuple[str, int], UnitSlots] = {}  # of this step
        self._keys: dict[tuple[EdgeEnd, int], tuple[Hashable, ...]] = {}

    def covered(self, module: str, unit: int) -> range:
        """The microbatches of a unit."""
        size = self._unit_sizes[module]
        return range(unit * size, min((unit + 1) * size, len(self._microbatches)))

    def shard(self, module: str, unit: int) -> Shard:
        """What this rank computes. No items: the unit is empty here."""
        return self._unit(module, unit).shard(self._modules[module].at)

    def stands_in(self, module: str, unit: int) -> bool:
        """Whether this rank computes an item that counts for nothing.

        Experts on other ranks wait for every slot: a slot without items sends them those of the unit's first.
        """
        return self._unit(module, unit).stands_in(self._modules[module].at.dp)

    def imbalance(self, module: str, unit: int) -> tuple[float, float]:
        """Load of the busiest slot over the mean: if owners computed their items themselves, and as it is."""
        return self._unit(module, unit).imbalance

    def rows(self, end: EdgeEnd, unit: int) -> HeldRows:
        """The edge's rows that this rank holds in a unit of the end's module."""
        return self._cache.find(("rows", self.is_marked, *self._key(end, unit)), lambda: self._find_rows(end, unit))

    def peers(self, end: EdgeEnd, unit: int) -> range:
        """The units at the other end that share microbatches with this one."""
        covered, size = self.covered(end.module, unit), self._unit_sizes[end.opposite.module]
        return range(covered[0] // size, covered[-1] // size + 1)

    def sends(self, end: EdgeEnd, unit: int, peer: int) -> tuple[Part, ...]:
        """This rank's rows of `unit` that go to the other end's unit `peer`: rows at the source, else gradients."""
        return self._parts(end, unit, peer)[0]

    def receives(self, end: EdgeEnd, unit: int, peer: int) -> tuple[Part, ...]:
        """This rank's rows of `unit` that come from the other end's unit `peer`: gradients at the source, else rows."""
        return self._parts(end, unit, peer)[1]

    def marks_sent(self, end: EdgeEnd, unit: int, peer: int) -> tuple[int, ...]:
        """A fingerprint for each part of `sends`: of the samples, and of which rows of them; none if not marked."""
        return self._marks(end, unit, peer, self.sends(end, unit, peer)) if self.is_marked else ()

    def marks_received(self, end: EdgeEnd, unit: int, peer: int) -> tuple[int, ...]:
        """The same for `receives`; the sender works it out from what it holds."""
        return self._marks(end, unit, peer, self.receives(end, unit, peer)) if self.is_marked else ()

    def hidden_mark(self, module: str, unit: int, chunk: int) -> int | None:
        """A fingerprint of this rank's shard of a unit, for hidden states that reach a chunk; None if not marked."""
        if not self.is_marked:
            return None
        shard, contents = self.shard(module, unit), [self._microbatches[m].content for m in self.covered(module, unit)]
        return mark(contents, (module, unit, chunk), np.array(shard.items), shard.tokens)

    # -- inside --------------------------------------------------------------------------------------------------

    def _key(self, end: EdgeEnd, unit: int) -> tuple[Hashable, ...]:
        """All that rows and messages of a unit depend on, in its microbatches and all others of the units opposite."""
        known = self._keys.get((end, unit))
        if known is not None:
            return known
        source, target, other = end.source, end.target, end.opposite.module
        own, peers = self.covered(end.module, unit), self.peers(end, unit)
        start, stop = self.covered(other, peers[0]).start, self.covered(other, peers[-1]).stop
        start, stop = min(start, own.start), max(stop, own.stop)
        place = (own.start - start, len(own), self.covered(other, peers[0]).start - start)
        seen = self._seen(range(start, stop), (source, target), source, target, self._backbone)
        self._keys[end, unit] = key = (end, place, *seen)
        return key

    def _seen(self, microbatches: range, *parts: str | tuple[str, str]) -> Iterator[bytes]:
        """Digests of these parts of the microbatches."""
        for m in microbatches:
            for part in parts:
                if (part, m) not in self._digests:
                    self._digests[part, m] = self._microbatches[m].digest(part)
                yield self._digests[part, m]

    def _parts(self, end: EdgeEnd, unit: int, peer: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """What this rank sends and receives for `unit`, to and from units `peer`."""
        key = ("parts", peer - self.peers(end, unit)[0], *self._key(end, unit))
        return self._cache.find(key, lambda: self._find_parts(end, unit, peer))

    def _find_parts(self, end: EdgeEnd, unit: int, peer: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        held, covered, shared = self.rows(end, unit), self.covered(end.module, unit), self._shared(end, unit, peer)
        first, stop = held.first[[shared.start - covered.start, shared.stop - covered.start]].tolist()
        blocks = blocks_of(held.opposite[first:stop], first)
        own, other = self._side(end, unit), self._side(end.opposite, peer)
        group, replica = own.group_of(self._modules[end.module].at)
        sent = outgoing(self._rank, own.ranks_of(group), other, blocks)
        return sent, incoming(self._rank, group, replica, other, blocks)

    def _marks(self, end: EdgeEnd, unit: int, peer: int, parts: Sequence[Part]) -> tuple[int, ...]:
        held, covered, shared = self.rows(end, unit), self.covered(end.module, unit), self._shared(end, unit, peer)
        contents = [self._microbatches[m].content for m in shared]
        where = (end.source, end.target, end.in_order(unit, peer))
        found = []
        for part in parts:
            rows = np.arange(len(held))[part.rows]
            microbatches = np.searchsorted(held.first, rows, side="right") - 1 + covered.start - shared.start
            found.append(mark(contents, where, microbatches, held.numbers[rows]))
        return tuple(found)

    def _shared(self, end: EdgeEnd, unit: int, peer: int) -> range:
        """The microbatches that `unit` and the other end's unit `peer` both cover."""
        covered, shared = self.covered(end.module, unit), self.covered(end.opposite.module, peer)
        return range(max(covered.start, shared.start), min(covered.stop, shared.stop))

    def _unit(self, module: str, unit: int) -> UnitSlots:
        if (module, unit) not in self._units:
            covered = self.covered(module, unit)  # what it is worth to move an item depends on the backbone's load, too
            key = ("unit", module, *self._seen(covered, *dict.fromkeys((module, self._backbone))))
            items = [self._microbatches[m].items for m in covered]
            found = self._cache.find(key, lambda: self._rules[module].choose(items))
            self._units[module, unit] = found
        return self._units[module, unit]

    def _side(self, end: EdgeEnd, unit: int) -> Side:
        found = self._unit(end.module, unit)
        return found.last if end.is_source else found.first

    def _find_rows(self, end: EdgeEnd, unit: int) -> HeldRows:
        at, other = self._modules[end.module].at, end.opposite.module
        found, own = self._unit(end.module, unit), self._side(end, unit)
        mine, _ = own.group_of(at)
        columns: list[list[Integers]] = [[], [], [], []]
        first = [0]
        for index, m in enumerate(self.covered(end.module, unit)):
            links = self._microbatches[m].links[end.source, end.target]
            ends = (links.source_items, links.source_starts), (links.target_items, links.target_starts)
            (items, starts), (far_items, far_starts) = ends if end.is_source else reversed(ends)
            near = np.flatnonzero(own.slot_of_item[items + found.offsets[index]] == at.dp)
            link, within = expand(links.rows[near])
            rows = near[link]
            item, token = items[rows] + found.offsets[index], starts[rows] + within
            number = (links.rows.cumsum() - links.rows)[rows] + within if self.is_marked else _NO_NUMBERS
            far_unit = m // self._unit_sizes[other]
            far_offset = self._unit(other, far_unit).offsets[m - self.covered(other, far_unit).start]
            far, far_token = far_items[rows] + far_offset, far_starts[rows] + within
            group, place = own.locate(item, token)
            if own.splits_tokens:
                kept = np.flatnonzero(group == mine)
                item, place, far, far_token = item[kept], place[kept], far[kept], far_token[kept]
                number = number[kept] if self.is_marked else _NO_NUMBERS
            columns[0].append(place)
            columns[1].append(own.index_in_slot[item])
            columns[2].append(self._side(end.opposite, far_unit).locate(far, far_token)[0])
            columns[3].append(number)
            first.append(first[-1] + len(item))
        tokens, row_items, groups, numbers = (np.concatenate(column) for column in columns)
        return HeldRows(tokens, row_items, groups, numbers, np.array(first, dtype=np.int64))
