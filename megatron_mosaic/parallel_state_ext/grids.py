"""Process groups of every module, created once per rank tuple, handed out as Megatron's ProcessGroupCollection.

    plan --list_groups--> (purpose, ranks) --one new_group each--> {("", (0, 1)): group, ...} --> collections

Every rank creates every group, in the same order; a rank keeps only those it is in.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mosaic.parallel_state_ext.group_list import (
    FIELDS,
    boundary_purpose,
    collective_purpose,
    edge_members,
    list_groups,
    pipeline_purpose,
    pipeline_ways,
)
from megatron_mosaic.parallel_state_ext.rank_view import RankView


class Grids:
    """All process groups of a plan. Collective: constructed by every rank, in the same order.

    `collections[m]` exists for the modules this rank runs. Collectives share one group per rank tuple; messages have a
    group of their own per edge or pipeline and direction.
    """

    def __init__(self, view: RankView, *, timeout: timedelta, apart: Collection[str] = ()) -> None:
        """`apart`: modules that run beside others, whose collectives need groups of their own."""
        started = time.perf_counter()
        plan, pairs = view.plan, tuple((edge.source, edge.target) for edge in view.edges)
        self._rank = view.rank
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {
            key: dist.new_group(list(key[1]), timeout=timeout) for key in dict.fromkeys(list_groups(plan, pairs, apart))
        }
        self.world = self._groups["", tuple(range(plan.world_size))]
        self.alone = self._groups["", (view.rank,)]
        self.collections = {
            name: ProcessGroupCollection(
                **{field: self._groups[collective_purpose(name, r, apart), r] for field, r in module.groups.items()}
            )
            for name, module in view.modules.items()
        }
        # Messages between two ranks arrive in the order they were sent, per communicator. Senders and receivers of one
        # module and direction agree on an order; of two modules they may not, so nothing is shared between modules.
        self._pipelines: dict[tuple[str, int, bool], dist.ProcessGroup] = {
            (name, *way): self._groups[pipeline_purpose(name, *way), module.groups["pp"]]
            for name, module in view.modules.items()
            for way in pipeline_ways(module.placed)
        }
        self._boundaries: dict[tuple[str, str], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        for source, target in pairs:
            members = edge_members(plan, source, target)
            for a, b in ((source, target), (target, source)):
                up, down = (self._groups[boundary_purpose(a, b, up), members] for up in (True, False))
                self._boundaries[a, b] = up, down
        self.creation_s = time.perf_counter() - started

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def boundary_groups(self, source: str, target: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The groups that carry messages from `source`'s ranks to `target`'s: to higher ranks, to lower ranks."""
        return self._boundaries[source, target]

    def pipeline_group(self, module: str, towards: int, *, wraps: bool) -> dist.ProcessGroup:
        """The group of hidden states that go to the module's next stage (+1), or of gradients to the one before (-1).

        `wraps`: between its last stage and its first, which only virtual stages do.
        """
        return self._pipelines[module, towards, wraps]

    def world_view(self) -> ProcessGroupCollection:
        """What the stock training loop is shown: every rank is a last stage, and losses are summed over the world.

        `mp` is the rank alone: norm and skip decision are the same on all ranks already (ModuleOptimizers).
        """
        fields = self._alone_fields()
        world = {"dp", "dp_cp", "dp_cp_gtp_remat", "intra_dp_cp", "tp_dp_cp", "intra_dist_opt"}
        return ProcessGroupCollection(**{f: self.world if f in world else group for f, group in fields.items()})

    def alone_view(self) -> ProcessGroupCollection:
        """Every group is this rank alone."""
        return ProcessGroupCollection(**self._alone_fields())

    def _alone_fields(self) -> dict[str, dist.ProcessGroup]:
        return {field: self.alone for field in FIELDS}

    def destroy(self) -> None:
        """Collective. Destroys every group this rank is in; the default group stays."""
        for (_, members), group in self._groups.items():
            if self._rank in members and group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self._groups.clear()
