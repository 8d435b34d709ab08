"""Every way to lay out one module, priced once as arrays: the rows that `compose.py` puts together.

A stage's cost is the sum of its layers' and of its ends', so a few one-stage works are priced (`Rates`) and every
number of pipeline stages, slots and microbatches follows by arithmetic. For ranking only: plans are priced later.

    row: tp 2, cp 1, pp 4, dp 8, recompute full  x  items of a unit  ->  seconds and bytes of its worst stage
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.cost_model.effects.memory import stage_memory
from megatron_mosaic.cost_model.effects.parameters import shards_of
from megatron_mosaic.cost_model.groups import stage_groups
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.source import CostSource
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.errors import ProfileError
from megatron_mosaic.plan import Layout, RankSet
from megatron_mosaic.plan.layout import Recompute
from megatron_mosaic.plan.training import Sharding
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.schedules.actions import Kind
from megatron_mosaic.search.space import Space

Floats = NDArray[np.float64]
_COLUMNS = 19  # of the table: seconds, units, three kinds that are held, units run again; the workspace
_MANY_TOKENS = 16384  # of a unit on a rank: from here on, costs are in proportion


@dataclass(frozen=True, slots=True)
class Row:
    """One way to lay out the module; without virtual stages."""

    layout: Layout
    sequence_parallel: bool
    recompute: Recompute

    @property
    def key(self) -> tuple[int, int, int, int, bool, Recompute]:
        """What the costs of a unit depend on, beside its items."""
        x = self.layout
        return x.tp, x.cp, x.ep, x.etp, self.sequence_parallel, self.recompute


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one layer, and of what the first and the last stage have beside their layers. Seconds: forward and backward of
    a unit. Bytes: what a live unit keeps; what a unit that is run again as a whole has for that moment; `held_bytes`:
    parameters, gradients, optimizer state, unsharded. `workspace_bytes` are there on every stage."""

    seconds: tuple[float, float, float]
    unit_bytes: tuple[float, float, float]
    again_bytes: tuple[float, float, float]
    held_bytes: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
    workspace_bytes: float


class ModuleOptions:
    """The rows of one module on every size worth trying, with arrays by row."""

    def __init__(self, module: ModuleConfig, space: Space, source: CostSource, *, recomputes: int) -> None:
        """`recomputes`: how many of the ways to recompute are rows, from the least on."""
        self.module, self._space, self._source = module, space, source
        self._rates: dict[tuple[object, int], Rates | None] = {}
        backward = module.name in space.workload.has_backward
        self._kinds = (Kind.F, Kind.B) if backward else (Kind.F,)
        self._reaches = space.workload.hidden_has_gradient(module.name)
        pinned = space.config.pin.of(module.name).rank_set
        sizes = space.sizes() if pinned is None else (len(pinned),)
        self.rows = tuple(
            Row(layout, split, again)
            for size in sizes
            for layout in space.layouts(module, size)
            for split in space.sequence_parallel(module, layout)[:1]
            for again in space.recomputes(module)[:recomputes]
        )

    def _column(self, axis: str) -> NDArray[np.int64]:
        return np.array([getattr(row.layout, axis) for row in self.rows], dtype=np.int64)

    @cached_property
    def dp(self) -> NDArray[np.int64]:
        return self._column("dp")

    @cached_property
    def pp(self) -> NDArray[np.int64]:
        return self._column("pp")

    @cached_property
    def num_ranks(self) -> NDArray[np.int64]:
        return np.array([row.layout.num_ranks for row in self.rows], dtype=np.int64)

    @cached_property
    def tail_s(self) -> Floats:
        """By row: gradients and optimizer of its heaviest stage."""
        return np.array([self._tail_s(row) for row in self.rows])

    @cached_property
    def _keys(self) -> tuple[list[Row], NDArray[np.int64]]:
        """One row for each different key, and by row its number."""
        number: dict[object, int] = {}
        rows: list[Row] = []
        for row in self.rows:
            if row.key not in number:
                number[row.key] = len(rows)
                rows.append(row)
        return rows, np.array([number[row.key] for row in self.rows], dtype=np.int64)

    def costs(self, chosen: NDArray[np.int64], items: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """By chosen row: seconds of a unit on its heaviest stage, bytes that are always held there, bytes of a live
        unit. Infinite where nothing was measured."""
        rows, key = self._keys
        pairs, inverse = np.unique(np.stack([key[chosen], items]), axis=1, return_inverse=True)
        table = np.array([self._flat(rows[k], n) for k, n in pairs.T.tolist()]).reshape(-1, _COLUMNS)[inverse.ravel()]
        pp = self.pp[chosen]
        layers, alone = self.module.num_layers / pp, pp == 1
        ends = np.where(alone, table[:, 1] + table[:, 2], np.maximum(table[:, 1], table[:, 2]))
        unit = layers * table[:, 3] + np.where(alone, table[:, 4] + table[:, 5], table[:, 4])
        shards = self._shards[chosen]
        held = np.zeros(len(chosen))
        for i in range(3):  # parameters, gradients, optimizer
            layer, first, last = table[:, 6 + i], table[:, 9 + i], table[:, 12 + i]
            part = layers * layer + np.where(alone, first + last, np.maximum(first, last))
            held += part / shards[:, i]
        again = layers * table[:, 15] + np.where(
            alone, table[:, 16] + table[:, 17], np.maximum(table[:, 16], table[:, 17])
        )
        return layers * table[:, 0] + ends, held + again + table[:, 18], unit

    @cached_property
    def _shards(self) -> Floats:
        """By row, over how many ranks parameters, gradients and optimizer state are split."""
        level = list(Sharding).index(self._source.setup.sharding)
        split = np.array(
            [shards_of(row.layout, self._source.setup)[bool(self.module.num_experts)] for row in self.rows], dtype=float
        )
        return np.stack([split if level > least else np.ones_like(split) for least in (2, 1, 0)], axis=1)

    def _flat(self, row: Row, items: int) -> tuple[float, ...]:
        many = max(1, -(-_MANY_TOKENS // self.module.tokens_per_item))
        rates = self._rate(row, min(items, many))
        if rates is None:
            return (math.inf,) * _COLUMNS
        factor = max(1.0, items / many)
        by_items = [factor * each for each in (*rates.seconds, *rates.unit_bytes)]
        again = [factor * each for each in rates.again_bytes]
        return (*by_items, *(x for each in rates.held_bytes for x in each), *again, rates.workspace_bytes)

    def _rate(self, row: Row, items: int) -> Rates | None:
        key = row.key, items
        if key not in self._rates:
            try:
                self._rates[key] = self._price(row, items)
            except ProfileError:
                self._rates[key] = None
        return self._rates[key]

    def _work(self, row: Row, items: int, *, first: bool, last: bool) -> StageWork:
        """All layers on one stage of as few ranks as can be."""
        x = row.layout
        one = Layout(tp=x.tp, cp=x.cp, dp=max(1, x.ep * x.etp // (x.tp * x.cp)), ep=x.ep, etp=x.etp)
        dense = self.module.num_dense_layers if self.module.num_experts else self.module.num_layers
        return StageWork(
            module=self.module,
            layout=one,
            dense_layers=dense,
            expert_layers=self.module.num_layers - dense,
            first=first,
            last=last,
            items=items,
            num_units=1,
            kinds=self._kinds,
            reaches_layers=self._reaches,
            recompute=row.recompute,
            sequence_parallel=row.sequence_parallel,
            share=1.0,
            groups=stage_groups(RankSet.block(0, one.num_ranks), one, self._space.cluster.gpus_per_node),
        )

    def _price(self, row: Row, items: int) -> Rates:
        source, count = self._source, self.module.num_layers
        unsharded = replace(source.setup, sharding=Sharding.none)
        seconds, units, held, again = [], [], [], []
        is_whole, workspace = row.recompute is Recompute.whole, 0.0
        for first, last in ((False, False), (True, False), (False, True)):
            work = self._work(row, items, first=first, last=last)
            seconds.append(sum(source.action_cost(work, kind).busy_s for kind in work.kinds))
            memory = stage_memory(work, source.precision, unsharded)
            units.append(memory.unit_bytes)
            held.append((memory.static.parameters, memory.static.gradients, memory.static.optimizer))
            always = memory.workspace_bytes
            if is_whole:
                plain = replace(work, recompute=Recompute.none)
                always = stage_memory(plain, source.precision, unsharded).workspace_bytes
            again.append(memory.workspace_bytes - always)
            workspace = max(workspace, always)
        return Rates(
            seconds=_ends(*seconds, count=count),
            unit_bytes=_passed(*units) if is_whole else _ends(*units, count=count),
            again_bytes=_ends(*again, count=count),
            held_bytes=tuple(zip(*(_ends(*parts, count=count) for parts in zip(*held)))),  # type: ignore[arg-type]
            workspace_bytes=workspace,
        )

    def _tail_s(self, row: Row) -> float:
        source, layout = self._source, row.layout
        rates = self._rate(row, 1)
        if rates is None:
            return math.inf
        layer, first, last = (each[1] for each in rates.held_bytes)  # gradients
        held = self.module.num_layers / layout.pp * layer + (first + last if layout.pp == 1 else max(first, last))
        if not held:
            return 0.0
        ranks = RankSet.block(0, layout.num_ranks // layout.pp)
        groups = stage_groups(ranks, layout, self._space.cluster.gpus_per_node)
        group = groups.expert_dp if self.module.num_experts else groups.dp
        num_parameters = held / source.precision.gradient_bytes
        if source.setup.sharding is not Sharding.none:
            num_parameters /= shards_of(layout, source.setup)[bool(self.module.num_experts)]
        exposed = 1.0 - 0.9 * source.setup.gradient_overlap_frac
        try:
            return exposed * source.comm.estimate(Operation.all_reduce, group, held) + source.optimizer_s(
                num_parameters
            )
        except ProfileError:
            return math.inf


def _passed(middle: float, first: float, last: float) -> tuple[float, float, float]:
    """What enters and leaves stages, however many layers they have: of one of several, and what is there beside it
    where one stage is both the first and the last."""
    most = max(middle, first)
    return 0.0, most, first + last - middle - most


def _ends(middle: float, first: float, last: float, *, count: int) -> tuple[float, float, float]:
    """(one of `count` layers, what the first stage has beside them, and the last)."""
    return middle / count, first - middle, last - middle
