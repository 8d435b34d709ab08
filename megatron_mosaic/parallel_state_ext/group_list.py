"""Which process groups a plan needs: pure integers, so that they can be counted without creating any.

Collectives share one group per rank tuple (purpose ""); those of modules that run beside each other have groups per
module, since two threads (or streams) on one group would mix up their order. Messages have a group of their own per
pipeline or edge and direction, so that each keeps its own order; and no group carries messages both ways between two
ranks, which NCCL would put into one queue: rows to higher and to lower ranks are apart, and so is what wraps around a
ring of virtual stages.
Every rank walks the list in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from megatron_mosaic.parallel_state_ext.ranks import axis_group_of, axis_groups, expert_group_of, expert_groups
from megatron_mosaic.plan import ModulePlan, Plan

GroupKey = tuple[str, tuple[int, ...]]  # purpose, ranks

# ProcessGroupCollection field -> the axes its groups span
_DENSE: dict[str, tuple[str, ...]] = {
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
_EXPERT: dict[str, tuple[str, ...]] = {
    "ep": ("ep",),
    "expt_tp": ("etp",),
    "expt_dp": ("expt_dp",),
    "intra_expt_dp": ("expt_dp",),
    "expt_dp_gtp_remat": ("expt_dp",),
    "tp_ep": ("etp", "ep"),
    "tp_ep_pp": ("etp", "ep", "pp"),
    "tp_ep_pp_with_egtp_remat": ("etp", "ep", "pp"),
}
FIELDS = (*_DENSE, *_EXPERT)


def list_groups(plan: Plan, edges: Iterable[tuple[str, str]], apart: Collection[str] = ()) -> list[GroupKey]:
    """Every group that is asked for, in the order of creation; equal ones are one group.

    A field with the axes of another asks again, as Megatron's own initialisation does. `apart`: modules whose
    collectives share no group with another module's.
    """
    asked: list[GroupKey] = [("", tuple(range(plan.world_size)))]
    asked += [("", (rank,)) for rank in range(plan.world_size)]
    for name, module in plan.modules.items():
        for field in FIELDS:
            asked += [(collective_purpose(name, members, apart), members) for members in field_groups(module, field)]
    for name, module in plan.modules.items():
        for towards, wraps in pipeline_ways(module):
            asked += [(pipeline_purpose(name, towards, wraps), chain) for chain in axis_groups(module, ("pp",))]
    for source, target in edges:
        members = edge_members(plan, source, target)
        for sender, receiver in ((source, target), (target, source)):
            asked += [(boundary_purpose(sender, receiver, up), members) for up in (True, False)]
    return asked


def field_groups(module: ModulePlan, field: str) -> list[tuple[int, ...]]:
    """The groups of one field of ProcessGroupCollection, ranks ascending; every rank of the module is in one."""
    groups = axis_groups(module, _DENSE[field]) if field in _DENSE else expert_groups(module, _EXPERT[field])
    return [tuple(sorted(members)) for members in groups]


def own_groups(module: ModulePlan, rank: int) -> dict[str, tuple[int, ...]]:
    """Field of ProcessGroupCollection -> the one of `field_groups` that this rank of the module is in."""
    dense = {field: axis_group_of(module, axes, rank) for field, axes in _DENSE.items()}
    return dense | {field: expert_group_of(module, axes, rank) for field, axes in _EXPERT.items()}


def edge_members(plan: Plan, source: str, target: str) -> tuple[int, ...]:
    """The ranks that exchange rows over an edge."""
    return tuple(sorted({*plan.modules[source].ranks.ranks, *plan.modules[target].ranks.ranks}))


def pipeline_ways(module: ModulePlan) -> list[tuple[int, bool]]:
    """(towards, wraps) of a module's hidden states: to the next stage (+1) or the one before (-1), and around."""
    wraps = (False, True) if module.layout.vpp > 1 else (False,)
    return [(towards, around) for towards in (+1, -1) for around in wraps] if module.layout.pp > 1 else []


def collective_purpose(module: str, members: Sequence[int], apart: Collection[str]) -> str:
    """The name of a group of a module's collectives: its own if the module is `apart`, unless a rank is alone in it."""
    return f"@{module}" if module in apart and len(members) > 1 else ""


def pipeline_purpose(module: str, towards: int, wraps: bool) -> str:
    """The name of a module's pipeline groups; `wraps`: between its last stage and its first."""
    return f"{module}{towards:+d}{'~' if wraps else ''}"


def boundary_purpose(source: str, target: str, up: bool) -> str:
    """The name of the group that carries rows (or gradients) from `source` to `target`; `up`: to a higher rank."""
    return f"{source}>{target}{'^' if up else 'v'}"
