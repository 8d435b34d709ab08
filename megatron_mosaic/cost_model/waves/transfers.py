"""Rows between slices: hidden states of a module that goes on elsewhere, and rows of edges; gradients the other way.

Each message goes once, by the routes of `effects/boundary_traffic.py`; a rank that keeps its samples moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_mosaic.cost_model.effects.boundary_traffic import Placement, list_messages
from megatron_mosaic.cost_model.effects.comm import CommModel
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.waves.slices import TaskUse
from megatron_mosaic.plan.tasks.waves import Slice
from megatron_mosaic.plan.workload import Workload

_INSIDE, _ACROSS = Group.on_one_node(2), Group(2, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What enters a slice: from another slice, so many values of all samples."""

    source: Slice
    values: float


def list_feeds(
    each: Slice, last: Mapping[tuple[str, str], Slice], uses: Mapping[tuple[str, str], TaskUse], workload: Workload
) -> Iterator[Feed]:
    """`last`: (task, module) -> its last slice so far."""
    use = uses[each.task, each.module]
    if each.first_layer:
        values = use.items * use.module.tokens_per_item * use.module.hidden_size
        yield Feed(source=last[each.task, each.module], values=values)
        return
    for edge in workload.edges:
        if edge.target == each.module and (edge.source, edge.target) in use.task.edges:
            items = uses[each.task, workload.items_of(edge)].items
            yield Feed(source=last[each.task, edge.source], values=items * edge.rows_per_item * edge.width)


def moved_values(feed: Feed, target: Slice) -> float:
    """That leave the rank that they are on."""
    return feed.values * float(list_messages(_place(feed.source), _place(target))[2].sum())


def transfer_s(feed: Feed, target: Slice, gpus_per_node: int, comm: CommModel, value_bytes: int) -> float:
    """Until the busiest rank has sent or received its messages; inside nodes and across at the same time."""
    sender, receiver, frac = list_messages(_place(feed.source), _place(target))
    if not len(frac):
        return 0.0
    crosses = sender // gpus_per_node != receiver // gpus_per_node
    size = 1 + int(max(sender.max(), receiver.max()))
    seconds = 0.0
    for chosen, group in ((~crosses, _INSIDE), (crosses, _ACROSS)):
        if chosen.any():
            busiest = max(float(np.bincount(ends[chosen], frac[chosen], size).max()) for ends in (sender, receiver))
            seconds = max(seconds, comm.estimate(Operation.p2p, group, busiest * feed.values * value_bytes))
    return seconds


def _place(each: Slice) -> Placement:
    return each.ranks, each.layout, False
