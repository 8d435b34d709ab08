"""Which data-parallel replicas of a lane do the same at the same time: they are one slot class.

Replicas have no barrier inside a step: each dp slot starts when its own ranks are free and its own inputs are there.

    slot       the tp x cp ranks of one replica of a stage; where experts lie on several of them, these together
    hand-over  between stages of a module: slot i to slot i. Between modules: to the slots on the same ranks, where all
               get an even share that way (the runtime moves no item without need); elsewhere slot i of n has the items
               [i/n, (i+1)/n) of a unit, and meets the slots opposite whose items overlap
    parts      a backbone with one slot leaves the others' items in order: of a unit of U microbatches, slot i of n has
               the microbatches [iU/n, (i+1)U/n), and hands over to and from those alone
    alike      slots that share ranks with alike slots and hand over to alike slots, however many: a start is a maximum

Slots are told apart until nothing is left to tell (colour refinement). Where a lane falls into more than `MAX_CLASSES`
(only where it has as many slots, on ranks that overlap irregularly), the step before is taken: slots that differ only
through others then wait for one another, so that times are exact or late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, RankSet

MAX_CLASSES = 64  # of a lane: the bits of a mask

Integers = NDArray[np.int64]
Pairs = tuple[Integers, Integers]  # slots of one lane, and slots of another that each of them meets
Link = tuple[int, int]  # a lane, and one that needs its results
Part = tuple[int, int, int]  # from, to, of so many
Units = tuple[int, tuple[int, ...]]  # a lane, and how many microbatches its units have


def part_of_unit(part: Part, num_microbatches: int) -> range:
    """The unit's microbatches of which the part has items."""
    low, high, count = part
    return range(low * num_microbatches // count, -(-high * num_microbatches // count))


@dataclass(frozen=True, slots=True)
class LaneSlots:
    """The slots of one lane: blocks of so many consecutive ranks of its stage."""

    module: str
    ranks: RankSet
    size: int

    @classmethod
    def of(cls, module: str, ranks: RankSet, layout: Layout) -> LaneSlots:
        return cls(module, ranks, math.lcm(layout.tp * layout.cp, layout.ep * layout.etp))

    @property
    def count(self) -> int:
        return len(self.ranks) // self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotClasses:
    """Alike slots of all lanes, without ranks: what the clock sees, and a program is kept by. Classes of a lane stand
    together."""

    first: tuple[int, ...]  # lane -> its first class; one more at the end
    occupies: tuple[tuple[int, ...], ...]  # class -> the kinds of ranks that it runs on
    feeds: FrozenMap[
        Link, tuple[tuple[int, ...], ...]
    ]  # by class of the lane that needs; no entry: all need the only one
    parts: FrozenMap[Link, tuple[Part, ...]]  # by class of the side that has several, its part of a unit

    @classmethod
    def one_each(cls, occupies: Sequence[Iterable[int]]) -> SlotClasses:
        """Where all slots of a lane are alike; `occupies`: lane -> kinds of ranks."""
        kinds = tuple(tuple(sorted(each)) for each in occupies)
        return cls(first=tuple(range(len(kinds) + 1)), occupies=kinds, feeds=FrozenMap(), parts=FrozenMap())


@dataclass(frozen=True, slots=True, kw_only=True)
class RankKind:
    """Ranks that do the same at the same time: with the same lanes, in alike slots of them."""

    ranks: RankSet
    rank_class: int  # number of the ranks with the same lanes that these are among
    slot_classes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """All slots of a plan."""

    classes: SlotClasses
    kinds: tuple[RankKind, ...]  # by the numbers in `classes.occupies`
    share: tuple[float, ...]  # by class, of its lane's slots


@lru_cache(maxsize=4096)
def find_replicas(
    lanes: tuple[LaneSlots, ...],
    links: tuple[Link, ...],
    rank_classes: tuple[tuple[RankSet, tuple[int, ...]], ...],
    parted: tuple[tuple[Link, Units], ...],
    max_classes: int = MAX_CLASSES,
    apart: bool = False,
) -> Replicas:
    """Slot classes of these lanes; `rank_classes`: ranks, and the lanes that they run; `parted`: links between a
    backbone of one slot and a lane whose slots have parts of its units; `apart`: each slot is a class of its own, in
    their order, because actions of one lane differ between them."""
    met = [sum(lane in each for _, each in rank_classes) for lane in range(len(lanes))]
    if not apart and not parted and all(count == 1 or lane.count == 1 for count, lane in zip(met, lanes)):
        occupies = [[c for c, (_, each) in enumerate(rank_classes) if lane in each] for lane in range(len(lanes))]
        kinds = [RankKind(ranks=r, rank_class=c, slot_classes=each) for c, (r, each) in enumerate(rank_classes)]
        classes = SlotClasses.one_each(occupies)
        return Replicas(classes=classes, kinds=tuple(kinds), share=(1.0,) * len(lanes))
    slots_on = [[_slots_at(lanes[lane], ranks) for lane in each] for ranks, each in rank_classes]
    handed = {link: _hand_over(lanes, link, rank_classes, slots_on) for link in links}
    parts = {link: lane for link, (lane, _) in parted}
    if apart:
        colours = [np.arange(lane.count) for lane in lanes]
        return _number(colours, rank_classes, slots_on, handed, parts)
    by_part = [np.zeros(lane.count, dtype=np.int64) for lane in lanes]
    for _, (lane, lengths) in parted:
        by_part[lane] = _tell_parts_apart(lanes[lane].count, lengths)
    colours = _tell_apart(lanes, by_part, [*_all_pairs(rank_classes, slots_on, handed)], max_classes)
    return _number(colours, rank_classes, slots_on, handed, parts)


def _tell_parts_apart(count: int, lengths: Iterable[int]) -> Integers:
    """Classes of slots that have the same microbatches of a unit, for units of each of these lengths."""
    parts = [tuple(part_of_unit((i, i + 1, count), length) for length in lengths) for i in range(count)]
    number = {part: i for i, part in enumerate(dict.fromkeys(parts))}
    return np.array([number[part] for part in parts], dtype=np.int64)


def _slots_at(lane: LaneSlots, ranks: RankSet) -> Integers:
    """The lane's slot of each of these ranks."""
    return np.searchsorted(_one_by_one(lane.ranks), _one_by_one(ranks)) // lane.size


def _one_by_one(ranks: RankSet) -> Integers:
    return np.concatenate([np.arange(*span) for span in ranks.spans])


def _hand_over(
    lanes: Sequence[LaneSlots],
    link: Link,
    rank_classes: Sequence[tuple[RankSet, tuple[int, ...]]],
    slots_on: Sequence[Sequence[Integers]],
) -> Pairs:
    """Slots of the two lanes that share items."""
    source, target = (lanes[each] for each in link)
    overlapping = _overlapping(source.count, target.count)
    if source.module == target.module:
        return overlapping
    on_same_ranks = [
        own * target.count + met
        for (_, each), slots in zip(rank_classes, slots_on)
        for lane, own in zip(each, slots)
        for other, met in zip(each, slots)
        if (lanes[lane].module, lanes[other].module) == (source.module, target.module)
    ]
    if not on_same_ranks:
        return overlapping
    sends, needs = np.divmod(np.unique(np.concatenate(on_same_ranks)), target.count)
    even = _is_even(sends, needs, source.count, target.count) and _is_even(needs, sends, target.count, source.count)
    return (sends, needs) if even else overlapping


def _is_even(own: Integers, met: Integers, count: int, opposite: int) -> bool:
    """Whether all slots opposite get as much, where each slot shares out what it has evenly."""
    shared = np.bincount(own, minlength=count)
    loads = np.bincount(met, weights=1 / shared[own], minlength=opposite)
    return bool(shared.all() and np.allclose(loads, count / opposite))


def _overlapping(count: int, opposite: int) -> Pairs:
    """Slots of the two sides whose shares of a unit's items overlap."""
    own = np.arange(count)
    low, high = own * opposite // count, -(-(own + 1) * opposite // count)
    met = high - low
    return own.repeat(met), np.arange(met.sum()) - (met.cumsum() - met - low).repeat(met)


def _all_pairs(
    rank_classes: Sequence[tuple[RankSet, tuple[int, ...]]], slots_on: list[list[Integers]], handed: dict[Link, Pairs]
) -> Iterable[tuple[int, int, Pairs]]:
    """Lane, another lane, and which slots of the two meet, on shared ranks or by handing over."""
    for (_, lanes), slots in zip(rank_classes, slots_on):
        for lane, own in zip(lanes, slots):
            yield from ((lane, other, (own, met)) for other, met in zip(lanes, slots) if other != lane)
    for (source, target), (sends, needs) in handed.items():
        yield source, target, (sends, needs)
        yield target, source, (needs, sends)


def _tell_apart(
    lanes: Sequence[LaneSlots],
    by_part: Sequence[Integers],
    relations: Sequence[tuple[int, int, Pairs]],
    max_classes: int,
) -> list[Integers]:
    """By lane, the class of each slot; those of lower slots first. `by_part`: classes to begin with."""
    colours = list(by_part) if max(map(_count, by_part)) <= max_classes else [each * 0 for each in by_part]
    while True:
        finer = list(colours)
        for lane, other, (own, met) in relations:
            masks = np.zeros(lanes[lane].count, dtype=np.uint64)
            np.bitwise_or.at(masks, own, np.uint64(1) << colours[other][met].astype(np.uint64))
            finer[lane] = _split(finer[lane], masks)
        if max(map(_count, finer)) > max_classes or [*map(_count, finer)] == [*map(_count, colours)]:
            return colours
        colours = finer


def _split(colours: Integers, values: NDArray[Any]) -> Integers:
    """Classes by both."""
    _, by_value = np.unique(values, return_inverse=True)
    _, firsts, by_both = np.unique(colours * len(values) + by_value, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[by_both]


def _count(colours: Integers) -> int:
    return int(colours.max()) + 1


def _number(
    colours: Sequence[Integers],
    rank_classes: Sequence[tuple[RankSet, tuple[int, ...]]],
    slots_on: Sequence[Sequence[Integers]],
    handed: dict[Link, Pairs],
    parted: dict[Link, int],
) -> Replicas:
    """Classes of all lanes in one count, kinds of ranks, which class needs which, and parts of units."""
    first = np.concatenate([[0], np.cumsum([*map(_count, colours)])])
    kinds: list[RankKind] = []
    for c, ((ranks, lanes), slots) in enumerate(zip(rank_classes, slots_on)):
        kind_of = np.zeros(len(ranks), dtype=np.int64)
        for lane, own in zip(lanes, slots):
            kind_of = _split(kind_of, colours[lane][own])
        each = _one_by_one(ranks)
        for number in range(_count(kind_of)):
            at = np.flatnonzero(kind_of == number)
            column = tuple(int(first[lane] + colours[lane][own[at[0]]]) for lane, own in zip(lanes, slots))
            kinds.append(RankKind(ranks=_joined(each[at]), rank_class=c, slot_classes=column))
    kinds.sort(key=lambda kind: kind.ranks.first)
    occupies: list[list[int]] = [[] for _ in range(first[-1])]
    for number, kind in enumerate(kinds):
        for each_class in kind.slot_classes:
            occupies[each_class].append(number)
    feeds: dict[Link, tuple[tuple[int, ...], ...]] = {}
    for (source, target), (sends, needs) in handed.items():
        for link, own, met in (((source, target), sends, needs), ((target, source), needs, sends)):
            pairs = {*zip(colours[link[1]][met].tolist(), (first[link[0]] + colours[link[0]][own]).tolist())}
            if len(pairs) > 1:
                needed = ([b for a, b in sorted(pairs) if a == each] for each in range(_count(colours[link[1]])))
                feeds[link] = tuple(map(tuple, needed))
    share = [count / len(each) for each in colours for count in np.bincount(each).tolist()]
    classes = SlotClasses(
        first=tuple(first.tolist()),
        occupies=tuple(map(tuple, occupies)),
        feeds=FrozenMap(feeds),
        parts=FrozenMap({link: tuple(_parts(colours[lane])) for link, lane in parted.items()}),
    )
    return Replicas(classes=classes, kinds=tuple(kinds), share=tuple(share))


def _parts(colours: Integers) -> Iterable[Part]:
    """By class, from its first slot to its last: more than it has, where another's stand between."""
    for each in range(_count(colours)):
        at = np.flatnonzero(colours == each)
        low, high, count = int(at[0]), int(at[-1]) + 1, len(colours)
        shared = math.gcd(low, high, count)
        yield low // shared, high // shared, count // shared


def _joined(ranks: Integers) -> RankSet:
    """Ascending ranks as spans."""
    cuts = np.flatnonzero(np.diff(ranks) > 1) + 1
    starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(ranks)]]) - 1
    return RankSet(tuple(zip(ranks[starts].tolist(), (ranks[ends] + 1).tolist())))
