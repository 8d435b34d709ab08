"""Which lane of a module computes which items of a unit: balanced by cost, and near their owners. Pure integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from megatron_mosaic.batch import (
    Integers,
    Items,
    Shard,
    balance_items,
    imbalance,
    item_costs,
    max_load,
    shard_of,
    split_evenly,
)
from megatron_mosaic.parallel_state_ext.ranks import Coordinates, near_lanes
from megatron_mosaic.parallel_state_ext.routes import Side, make_side
from megatron_mosaic.plan import Plan
from megatron_mosaic.workload import Workload

MIN_GAIN_FRAC = 0.05  # of a rank's computation: an image that moves to save less costs more in messages


class UnitLanes:
    """The items of one unit of one module, and which lane computes which."""

    def __init__(self, plan: Plan, workload: Workload, module: str, covered: Sequence[Mapping[str, Items]]) -> None:
        self._placed = plan.modules[module]
        self.offsets = np.cumsum([0, *(len(items[module]) for items in covered)])
        self.tokens = np.concatenate([items[module].tokens for items in covered])
        self.costs = item_costs(workload.by_name[module], self.tokens)
        backbone = workload.backbone.name
        if module == backbone:
            assert len(covered) == 1, "the backbone's unit is its microbatch"
            lanes = split_evenly(len(self.tokens), self._placed.layout.dp)
            self.lanes = self.owned = tuple(map(tuple, lanes))
        else:
            near = near_lanes(plan, backbone, module)
            owners = [int(s) // plan.micro_batch_size for items in covered for s in items[module].samples]
            self.owned = _owned(near, owners, self._placed.layout.dp)
            preferred = [near[owner] for owner in owners]
            balanced = balance_items(self.costs, preferred, self._placed.layout.dp)
            blocks = _blocks(preferred, self._placed.layout.dp)
            # In doubt, what moves nothing: as owned, or blocks, whose rows are consecutive and travel without a copy.
            near_by = (self.owned, blocks) if blocks else (self.owned,)
            stay = min(near_by, key=lambda lanes: imbalance(lanes, self.costs))
            tokens = np.concatenate([items[backbone].tokens[: plan.micro_batch_size] for items in covered])
            self.lanes = balanced if self._saves_enough(stay, balanced, plan, workload, module, tokens) else stay

    def _saves_enough(
        self,
        stay: Sequence[Sequence[int]],
        balanced: Sequence[Sequence[int]],
        plan: Plan,
        workload: Workload,
        module: str,
        backbone_tokens: Integers,
    ) -> bool:
        """Whether items should leave for other ranks: not for less than MIN_GAIN_FRAC of what a shared rank computes.

        `backbone_tokens`: of the samples of one backbone lane. Where no rank is shared, rows travel in any case.
        """
        before, after = (max_load(lanes, self.costs) for lanes in (stay, balanced))
        if after >= before:
            return False
        backbone = workload.backbone.name
        if not {*plan.modules[module].ranks.ranks} & {*plan.modules[backbone].ranks.ranks}:
            return True
        own = _share_of_rank(plan, workload, module)
        total = own * before + _share_of_rank(plan, workload, backbone) * int(
            item_costs(workload.backbone, backbone_tokens).sum()
        )
        return own * (before - after) >= MIN_GAIN_FRAC * total

    @cached_property
    def imbalance(self) -> tuple[float, float]:
        """Load of the busiest lane over the mean: if owners computed their items themselves, and as it is."""
        return imbalance(self.owned, self.costs), imbalance(self.lanes, self.costs)

    def is_ghost(self, lane: int) -> bool:
        layout = self._placed.layout
        return not self.lanes[lane] and len(self.tokens) > 0 and layout.ep * layout.etp > 1

    def shard(self, lane: int, at: Coordinates) -> Shard:
        items = (0,) if self.is_ghost(lane) else self.lanes[lane]
        return shard_of(self._placed, items, self.tokens, cp=at.cp, tp=at.tp)

    @cached_property
    def first(self) -> Side:
        """Where rows arrive: the first stage."""
        return self._make_side(0)

    @cached_property
    def last(self) -> Side:
        """Where rows leave: the last stage."""
        return self._make_side(self._placed.layout.pp - 1)

    def _make_side(self, stage: int) -> Side:
        return make_side(self._placed, stage, self.lanes, self.tokens)


def _share_of_rank(plan: Plan, workload: Workload, module: str) -> float:
    """What one rank computes of a unit of cost in one layer, over all layers."""
    layout = plan.modules[module].layout
    return workload.by_name[module].num_layers / (layout.tp * layout.cp * layout.pp)


def _owned(near: Sequence[Sequence[int]], owners: Sequence[int], num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """Lanes, if each item stayed with its owner: the first of the lanes next to it."""
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    for item, owner in enumerate(owners):
        lanes[near[owner][0]].append(item)
    return tuple(map(tuple, lanes))


def _blocks(preferred: Sequence[Sequence[int]], num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive items per lane, each on a lane that it prefers; nothing where that cannot be."""
    lanes = tuple(map(tuple, split_evenly(len(preferred), num_lanes)))
    fits = all(lane in preferred[item] for lane, items in enumerate(lanes) for item in items)
    return lanes if fits else ()
