"""Which slot of a module computes which items of a unit: balanced by cost, and near their owners. Pure integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.balance import (
    Slots,
    balance_items,
    item_costs,
    least_load,
    split_evenly,
)
from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, Items, Shard, padded_length, shard_of
from megatron_mosaic.parallel_state_ext.boundaries.routes import Side
from megatron_mosaic.parallel_state_ext.ranks import near_slots
from megatron_mosaic.plan import ModulePlan, Plan
from megatron_mosaic.plan.layout import Coordinates
from megatron_mosaic.plan.workload import Workload

MIN_GAIN_FRAC = 0.05  # of a rank's computation: an image that moves to save less costs more in messages


class UnitSlots:
    """The items of one unit of one module, and which slot computes which."""

    def __init__(
        self,
        placed: ModulePlan,
        offsets: Integers,
        tokens: Integers,
        slots: Slots,
        imbalance: tuple[float, float],
    ) -> None:
        """`offsets`: at which item each microbatch of the unit begins.

        `imbalance`: load of the busiest slot over the mean, if owners computed their items themselves, and as it is.
        """
        self._placed, self.offsets, self.tokens, self.slots = placed, offsets, tokens, slots
        self.imbalance = imbalance
        self._shards: dict[Coordinates, Shard] = {}
        lengths = np.zeros(len(slots), dtype=np.int64)
        np.maximum.at(lengths, slots.of_item, tokens)
        held = slots.of_item, slots.index_in_slot, padded_length(placed, lengths)
        self.first = Side(placed, 0, *held)  # where rows arrive: the first stage
        self.last = Side(placed, placed.layout.pp - 1, *held)  # where they leave

    def stands_in(self, slot: int) -> bool:
        """Whether the slot, which has no items, computes the unit's first, so that experts hear from every slot."""
        layout = self._placed.layout
        return not len(self.slots[slot]) and len(self.tokens) > 0 and layout.ep * layout.etp > 1

    def shard(self, at: Coordinates) -> Shard:
        """What the ranks at these coordinates compute, on whatever stage."""
        if at not in self._shards:
            items = [0] if self.stands_in(at.dp) else self.slots[at.dp].tolist()
            self._shards[at] = shard_of(self._placed, items, self.tokens, cp=at.cp, tp=at.tp)
        return self._shards[at]


class SlotRule:
    """How the items of one module's units find their slots. Everything that does not change from step to step."""

    def __init__(self, plan: Plan, workload: Workload, module: str) -> None:
        self._name, self._config, self._placed = module, workload.by_name[module], plan.modules[module]
        self._backbone, self._micro_batch_size = workload.backbone, plan.micro_batch_size
        self._num_slots = self._placed.layout.dp
        self._near = near_slots(plan, self._backbone.name, module)
        self._nearest = np.array([slots[0] for slots in self._near], dtype=np.int64)
        self._near_pairs = np.array([o * self._num_slots + d for o, slots in enumerate(self._near) for d in slots])
        self._share, self._backbone_share = (
            _share_of_rank(plan, workload, name) for name in (module, self._backbone.name)
        )
        self._shares_ranks = not {*self._placed.ranks.ranks}.isdisjoint(plan.modules[self._backbone.name].ranks.ranks)

    def choose(self, covered: Sequence[Mapping[str, Items]]) -> UnitSlots:
        """The slots of a unit that covers these microbatches."""
        counts = [len(items[self._name]) for items in covered]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        tokens = np.concatenate([items[self._name].tokens for items in covered])
        costs = item_costs(self._config, tokens)
        if self._name == self._backbone.name:
            assert len(covered) == 1, "the backbone's unit is its microbatch"
            owned = slots = split_evenly(len(tokens), self._num_slots)
        else:
            owners = np.concatenate([items[self._name].samples for items in covered]) // self._micro_batch_size
            owned = Slots.of(self._nearest[owners], self._num_slots)
            slots = self._balance(owners, owned, costs, covered)
        mean = int(costs.sum()) / self._num_slots
        by_owner, balanced = (chosen.max_load(costs) / mean if mean else 1.0 for chosen in (owned, slots))
        return UnitSlots(self._placed, offsets, tokens, slots, (by_owner, balanced))

    def _balance(
        self, owners: Integers, owned: Slots, costs: Integers, covered: Sequence[Mapping[str, Items]]
    ) -> Slots:
        """As owned, unless other slots make the busiest one's load smaller by what is worth it.

        In doubt, what moves nothing: as owned, or blocks, whose rows are consecutive and travel without a copy.
        """
        stay, load, least = owned, owned.max_load(costs), least_load(costs, self._num_slots)
        if load == least:
            return owned
        blocks = split_evenly(len(owners), self._num_slots)
        if (load_of_blocks := blocks.max_load(costs)) < load and self._are_near(owners, blocks):
            stay, load = blocks, load_of_blocks
        needed = max(1.0, self._needed_gain(load, covered))
        if load - least < needed:
            return stay
        balanced = balance_items(costs, [self._near[owner] for owner in owners.tolist()], self._num_slots)
        return balanced if load - balanced.max_load(costs) >= needed else stay

    def _needed_gain(self, load: int, covered: Sequence[Mapping[str, Items]]) -> float:
        """What a busiest slot must save of its load before items leave for other ranks.

        Where ranks are shared, MIN_GAIN_FRAC of what such a rank computes for both; elsewhere rows travel in any case.
        """
        if not self._shares_ranks:
            return 0.0
        tokens = np.concatenate([items[self._backbone.name].tokens[: self._micro_batch_size] for items in covered])
        backbone = self._backbone_share * int(item_costs(self._backbone, tokens).sum())
        return MIN_GAIN_FRAC * (load + backbone / self._share)

    def _are_near(self, owners: Integers, slots: Slots) -> bool:
        """Whether every item is on a slot near its owner's."""
        pairs = owners * self._num_slots + slots.of_item
        found = np.searchsorted(self._near_pairs, pairs).clip(max=len(self._near_pairs) - 1)
        return bool((self._near_pairs[found] == pairs).all())


def _share_of_rank(plan: Plan, workload: Workload, module: str) -> float:
    """What one rank computes of a unit of cost in one layer, over all layers."""
    layout = plan.modules[module].layout
    return workload.by_name[module].num_layers / (layout.tp * layout.cp * layout.pp)
