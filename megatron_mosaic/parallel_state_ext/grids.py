"""Process groups of every module, created once per rank tuple, handed out as Megatron's ProcessGroupCollection.

    plan --axis_groups--> rank tuples --one new_group each--> {(0, 1): group, ...} --> one collection per module

Every rank creates every group, in the same order; a rank keeps only those it is in.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mosaic.parallel_state_ext.ranks import axis_groups, expert_groups
from megatron_mosaic.plan import ModulePlan, Plan

# ProcessGroupCollection field -> the axes its groups span
_DENSE_FIELDS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "dp_cp": ("cp", "dp"),
    "dp_cp_gtp_remat": ("cp", "dp"),
    "intra_dp_cp": ("cp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
    "embd": (),  # embeddings are not tied across stages, so nobody shares their gradients
    "pos_embd": (),
    "gtp_remat": (),
    "expt_gtp_remat": (),
}
_EXPERT_FIELDS = {
    "ep": "ep",
    "expt_tp": "expt_tp",
    "expt_dp": "expt_dp",
    "intra_expt_dp": "expt_dp",
    "expt_dp_gtp_remat": "expt_dp",
    "tp_ep": "tp_ep",
    "tp_ep_pp": "tp_ep_pp",
    "tp_ep_pp_with_egtp_remat": "tp_ep_pp",
}


class Grids:
    """All process groups of a plan. Collective: constructed by every rank, in the same order.

    `collections[m]` exists for the modules this rank runs. Collectives share one group per rank tuple; messages have a
    group of their own per edge or pipeline and direction.
    """

    def __init__(self, plan: Plan, edges: Iterable[tuple[str, str]], *, timeout: timedelta) -> None:
        started = time.perf_counter()
        self._plan, self._timeout = plan, timeout
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self.rank = dist.get_rank()
        everyone = tuple(range(plan.world_size))
        self.world = self._group(everyone)
        self.alone = self._own_group()
        self.collections: dict[str, ProcessGroupCollection] = {}
        for name, module in plan.modules.items():
            collection = self._module_collection(module)
            if self.rank in module.ranks.ranks:
                self.collections[name] = collection
        # Messages between two ranks arrive in the order they were sent, per communicator. Senders and receivers of one
        # module and direction agree on an order; of two modules they may not, so nothing is shared between modules.
        self._pipelines: dict[tuple[str, int], dist.ProcessGroup] = {}
        for name, module in plan.modules.items():
            for towards in (+1, -1) if module.layout.pp > 1 else ():
                chains = [self._group(ranks, purpose=f"{name}{towards:+d}") for ranks in axis_groups(module, ("pp",))]
                for ranks, group in zip(axis_groups(module, ("pp",)), chains, strict=True):
                    if self.rank in ranks:
                        self._pipelines[name, towards] = group
        self._boundaries: dict[tuple[str, str], dist.ProcessGroup] = {}
        for source, target in edges:
            members = tuple(sorted({*plan.modules[source].ranks.ranks, *plan.modules[target].ranks.ranks}))
            # One communicator per edge and direction, so that each keeps its own message order.
            for pair in ((source, target), (target, source)):
                self._boundaries[pair] = self._group(members, purpose=f"{pair[0]}>{pair[1]}")
        self.creation_s = time.perf_counter() - started

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def boundary_group(self, source: str, target: str) -> dist.ProcessGroup:
        """The group that carries messages from `source`'s ranks to `target`'s."""
        return self._boundaries[source, target]

    def pipeline_group(self, module: str, towards: int) -> dist.ProcessGroup:
        """The group that carries hidden states to the module's next stage (+1), or gradients to the one before (-1)."""
        return self._pipelines[module, towards]

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
        return {field: self.alone for field in (*_DENSE_FIELDS, *_EXPERT_FIELDS)}

    def destroy(self) -> None:
        """Collective. Destroys every group this rank is in; the default group stays."""
        for (_, members), group in self._groups.items():
            if self.rank in members and group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self._groups.clear()

    def _group(self, members: tuple[int, ...], purpose: str = "") -> dist.ProcessGroup:
        """The group of these ranks for this purpose; created by every rank on first use."""
        key = (purpose, members)
        if key not in self._groups:
            self._groups[key] = dist.new_group(list(members), timeout=self._timeout)
        return self._groups[key]

    def _own_group(self) -> dist.ProcessGroup:
        groups = [self._group((rank,)) for rank in range(self._plan.world_size)]
        return groups[self.rank]

    def _module_collection(self, module: ModulePlan) -> ProcessGroupCollection:
        fields = {}
        for field, axes in _DENSE_FIELDS.items():
            fields[field] = self._pick(axis_groups(module, axes))
        for field, name in _EXPERT_FIELDS.items():
            fields[field] = self._pick(expert_groups(module, name))
        return ProcessGroupCollection(**fields)

    def _pick(self, rank_lists: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup | None:
        """Create all of these groups; return the one this rank is in."""
        mine = None
        for members in rank_lists:
            group = self._group(tuple(sorted(members)))
            if self.rank in members:
                mine = group
        return mine
