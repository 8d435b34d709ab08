"""How much of an edge's rows ranks receive and send inside a node and across nodes, as the runtime's routes have it.

    source rank holds [i/ds, (i+1)/ds) of the items, every (cp x sp)-th token     a rank in both sides keeps
    target rank needs [j/dt, (j+1)/dt) of the items, every (cp x sp)-th token     what it has: no message

Every row goes once to every rank that needs it and lacks it; replica t of target group g reads from replica
(g + t) mod n of the n that hold a row. NVLink and the network carry their rows side by side, each for its busiest rank.
Exact where slots hold consecutive items (tests compare it with the runtime's StepMap). On partly overlapping ranks the
runtime keeps items where they are and fills slots with the rest: what a rank receives is at most this, but what is sent
may be more, in few cases.
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
    """What the busiest rank moves between two actions, in values: inside its node, and across nodes at the same
    time."""

    intra_values: float
    inter_values: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Shares of all rows of a global microbatch over links of one class; the way back is the same, swapped."""

    received_frac: float  # by the rank that receives most
    sent_frac: float  # by the rank that sends most
    total_frac: float  # by all ranks

    @property
    def busiest_frac(self) -> float:
        return max(self.received_frac, self.sent_frac)


def stage_message(source: Lane, target: Lane, gpus_per_node: int, scattered: bool) -> Message:
    """Between two stages of a module: the hidden states [tokens, items, hidden] of a dp slot, or their gradients.

    Each tp rank sends its own: the whole tensor, a part of it under sequence parallelism (megatron.core
    pipeline_parallel/schedules.py, get_tensor_shapes). `scattered`: a part in any case, put together over NVLink
    (Narayanan et al. 2021, section 4.1; gone from Megatron since).
    """
    work = source.work
    split = work.layout.cp * work.layout.tp if scattered else work.hidden_split
    values = work.items * work.module.tokens_per_item * work.module.hidden_size / split
    if Group.pair(source.ranks.first, target.ranks.first, gpus_per_node).nodes == 1:
        return Message(intra_values=values, inter_values=0.0)
    return Message(intra_values=0.0, inter_values=values)


def boundary_message(edge: Edge, source: Lane, target: Lane, gpus_per_node: int) -> Message:
    """Between two modules: the rows of the edge, or their gradients, that the busiest rank sends or receives."""
    carrier = target.work if source.work.module.role is Role.backbone else source.work
    values = carrier.items * carrier.layout.dp * edge.rows_per_item * edge.width
    intra, inter = boundary_traffic(source, target, gpus_per_node)
    return Message(intra_values=values * intra.busiest_frac, inter_values=values * inter.busiest_frac)


def boundary_traffic(source: Lane, target: Lane, gpus_per_node: int) -> tuple[Traffic, Traffic]:
    """From the last stage of one module to the first of another: inside nodes, and across."""
    sides = [(lane.ranks, lane.work.layout, lane.work.sequence_parallel) for lane in (source, target)]
    return _traffic(*sides, gpus_per_node)


@lru_cache(maxsize=4096)
def list_messages(source: Placement, target: Placement) -> tuple[Integers, Integers, Floats]:
    """Sender, receiver and share of all rows of every message from one stage to another."""
    return _messages(_side(*source), _side(*target))


Placement = tuple[RankSet, Layout, bool]  # ranks of a stage, layout of its module, sequence parallelism


@lru_cache(maxsize=4096)
def _traffic(source: Placement, target: Placement, gpus_per_node: int) -> tuple[Traffic, Traffic]:
    sends, needs = _side(*source), _side(*target)
    sender, receiver, frac = _messages(sends, needs)
    crosses = sender // gpus_per_node != receiver // gpus_per_node
    size = 1 + int(max(sends.ranks.max(), needs.ranks.max()))

    def over(chosen: NDArray[np.bool_]) -> Traffic:
        received, sent = (np.bincount(ends[chosen], frac[chosen], size) for ends in (receiver, sender))
        return Traffic(received_frac=float(received.max()), sent_frac=float(sent.max()), total_frac=float(sent.sum()))

    return over(~crosses), over(crosses)


@dataclass(frozen=True, slots=True)
class _Side:
    """Ranks of one stage in groups of replicas: [slots, shards of the tokens, replicas]."""

    ranks: Integers
    cuts: tuple[int, int]  # of the tokens: by cp, and by tp under sequence parallelism


def _side(ranks: RankSet, layout: Layout, sequence_parallel: bool) -> _Side:
    split = layout.tp if sequence_parallel else 1
    each = np.concatenate([np.arange(*span) for span in ranks.spans])
    return _Side(each.reshape(layout.dp, layout.cp * split, layout.tp // split), (layout.cp, split))


def _messages(sends: _Side, needs: _Side) -> tuple[Integers, Integers, Floats]:
    """Sender, receiver and share of all rows of every message.

    Of shards that are cut differently, two have in common what two random ones would.
    """
    pairs = _slots_in_common(len(sends.ranks), len(needs.ranks))
    i, j, items = (each[:, None, None, None] for each in pairs)  # by pair of slots, held shard, needed shard, reader
    _, num_held, num_holders = sends.ranks.shape
    _, num_needed, num_readers = needs.ranks.shape
    alike = sends.cuts == needs.cuts
    held, needed, reader = np.ogrid[: 1 if alike else num_held, :num_needed, :num_readers]
    held = needed if alike else held
    receiver = needs.ranks[j, needed, reader]
    sender = sends.ranks[i, held, (j * num_needed + needed + reader) % num_holders]
    kept = (sends.ranks[i, held] == receiver[..., None]).any(axis=-1)
    frac = items / (num_held if alike else num_held * num_needed)
    sender, receiver, frac, kept = np.broadcast_arrays(sender, receiver, frac, kept)
    return sender[~kept], receiver[~kept], frac[~kept]


def _slots_in_common(num_sources: int, num_targets: int) -> tuple[Integers, Integers, Floats]:
    """Source slot, target slot and the share of all items that both have, for those that have any."""
    cuts = np.union1d(np.arange(num_sources + 1) * num_targets, np.arange(num_targets + 1) * num_sources)
    first = cuts[:-1]
    return first // num_targets, first // num_sources, np.diff(cuts) / (num_sources * num_targets)
