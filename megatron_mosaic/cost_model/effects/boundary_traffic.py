"""How much of an edge's rows the busiest rank receives and sends: what the runtime's routes come to, in closed form.

    source rank holds [i/ds, (i+1)/ds) of the items, every (cp x sp)-th token     a rank in both sides keeps
    target rank needs [j/dt, (j+1)/dt) of the items, every (cp x sp)-th token     what it has: no message

Every row goes once to every rank that needs it and lacks it, and a source's replicas share the sending. Exact where
slots hold consecutive items (tests compare it with the runtime's StepMap). On partly overlapping ranks the runtime
keeps items where they are and fills slots with the rest: what a rank receives is at most this, but what is sent may
be more, in few cases (source 0,2,4 dp3, target 0-2,4 dp4: 640 rows, here 512).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.work import Lane
from megatron_mosaic.plan import Layout, RankSet
from megatron_mosaic.plan.workload import Edge, Role

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one rank sends another between two actions: so many values, over this pair of ranks."""

    values: float
    pair: Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Shares of all rows of a global microbatch; the way back is the same with the two swapped."""

    received_frac: float  # by the rank that receives most
    sent_frac: float  # by the rank that sends most, if a source's replicas share evenly

    @property
    def busiest_frac(self) -> float:
        return max(self.received_frac, self.sent_frac)


def stage_message(source: Lane, target: Lane, gpus_per_node: int) -> Message:
    """Between two stages of a module: the hidden states [tokens, items, hidden] of a dp slot, or their gradients.

    Between nodes each tp rank sends its part, put together over NVLink (Narayanan et al. 2021, section 4.1).
    """
    pair, work = Group.pair(source.ranks.first, target.ranks.first, gpus_per_node), source.work
    split = work.layout.cp * work.layout.tp if pair.nodes > 1 else work.hidden_split
    width = work.module.tokens_per_item * work.module.hidden_size / split
    return Message(values=work.items * width, pair=pair)


def boundary_message(edge: Edge, source: Lane, target: Lane, gpus_per_node: int) -> Message:
    """Between two modules: the rows of the edge, or their gradients, that the busiest rank sends or receives."""
    low = min(source.ranks.first, target.ranks.first)
    high = max(source.ranks.last, target.ranks.last)
    carrier = target.work if source.work.module.role is Role.backbone else source.work
    frac = boundary_traffic(source, target).busiest_frac if high > low else 0.0
    items = carrier.items * carrier.layout.dp
    return Message(values=frac * items * edge.rows_per_item * edge.width, pair=Group.pair(low, high, gpus_per_node))


def boundary_traffic(source: Lane, target: Lane) -> Traffic:
    """From the last stage of one module to the first of another."""
    return _traffic(*((lane.ranks, lane.work.layout, lane.work.sequence_parallel) for lane in (source, target)))


_Placement = tuple[RankSet, Layout, bool]  # ranks of a stage, layout of its module, sequence parallelism


@lru_cache(maxsize=4096)
def _traffic(source: _Placement, target: _Placement) -> Traffic:
    sends, needs = _side(*source), _side(*target)
    needed = np.full(len(needs.ranks), 1 / (needs.num_slots * needs.num_shards))
    _, at_source, at_target = np.intersect1d(sends.ranks, needs.ranks, assume_unique=True, return_indices=True)
    kept = np.zeros_like(needed)
    kept[at_target] = _overlap(sends, needs, at_source, at_target)
    received = needed - kept
    return Traffic(received_frac=float(received.max()), sent_frac=float(received.sum()) / len(sends.ranks))


@dataclass(frozen=True, slots=True)
class _Side:
    """Ranks of one stage, and what each of them holds."""

    ranks: Integers
    dp: Integers
    shard: Integers  # of the tokens
    num_slots: int
    cuts: tuple[int, int]  # cp, and tp under sequence parallelism

    @property
    def num_shards(self) -> int:
        return self.cuts[0] * self.cuts[1]


def _side(ranks: RankSet, layout: Layout, sequence_parallel: bool) -> _Side:
    dp, cp, tp = np.indices(layout.degrees[2::-1]).reshape(3, -1)  # of the ranks of a stage, tp fastest
    split = layout.tp if sequence_parallel else 1
    each = np.concatenate([np.arange(*span) for span in ranks.spans])
    return _Side(each, dp, cp * split + tp % split, layout.dp, (layout.cp, split))


def _overlap(sends: _Side, needs: _Side, at_source: Integers, at_target: Integers) -> Floats:
    """Share of all rows that a rank on both sides has and needs."""
    i, j = sends.dp[at_source] / sends.num_slots, needs.dp[at_target] / needs.num_slots
    items = np.minimum(i + 1 / sends.num_slots, j + 1 / needs.num_slots) - np.maximum(i, j)
    if sends.cuts == needs.cuts:
        tokens = (sends.shard[at_source] == needs.shard[at_target]) / sends.num_shards
    else:  # of shards that are cut differently, what two random ones have in common; all of one side's if it is whole
        tokens = np.full(len(at_source), 1 / (sends.num_shards * needs.num_shards))
    return np.asarray(np.maximum(items, 0.0) * tokens)
