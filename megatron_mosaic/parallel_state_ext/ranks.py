"""Plan -> rank lists per module and axis. Pure integers; any rank set, contiguous or not.

Inside a module ranks are laid out tp fastest, then cp, then dp, pp slowest (Megatron's default order), over the
module's sorted rank set:  position = tp + TP * (cp + CP * (dp + DP * pp)).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_mosaic.plan import ModulePlan, Plan

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands in a module's layout."""

    tp: int
    cp: int
    dp: int
    pp: int


def coordinates_of(module: ModulePlan, rank: int) -> Coordinates:
    """The rank's place in the module's layout. ValueError if the rank is not in it."""
    position = module.ranks.ranks.index(rank)
    places = []
    for axis in AXES:
        position, place = divmod(position, getattr(module.layout, axis))
        places.append(place)
    return Coordinates(*places)


def rank_at(module: ModulePlan, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
    """The global rank at these coordinates."""
    layout = module.layout
    return module.ranks.ranks[tp + layout.tp * (cp + layout.cp * (dp + layout.dp * pp))]


def axis_groups(module: ModulePlan, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Rank lists of the groups that span `axes`: every rank of the module is in exactly one of them.

    `axis_groups(m, ("tp",))` are the tensor-parallel groups, `()` gives one group per rank.
    """
    unknown = set(axes) - set(AXES)
    assert not unknown, f"unknown axes {sorted(unknown)}"
    fixed = [axis for axis in reversed(AXES) if axis not in axes]
    moving = [axis for axis in reversed(AXES) if axis in axes]
    groups = []
    for outer in itertools.product(*(range(getattr(module.layout, axis)) for axis in fixed)):
        base = dict(zip(fixed, outer, strict=True))
        groups.append(
            tuple(
                rank_at(module, **base, **dict(zip(moving, inner, strict=True)))
                for inner in itertools.product(*(range(getattr(module.layout, axis)) for axis in moving))
            )
        )
    return tuple(groups)


def near_slots(plan: Plan, owner: str, module: str) -> tuple[tuple[int, ...], ...]:
    """For each slot of `owner`, the slots of another module that its items should stay on.

    Those that share a rank with it; where none does, those at the same height, so that few pairs of slots talk.
    """
    placed = plan.modules[module]
    slot_of = {rank: dp for dp in range(placed.layout.dp) for rank in _slot_ranks(placed, dp)}
    found, num_owners = [], plan.modules[owner].layout.dp
    for slot in range(num_owners):
        shared = {slot_of[rank] for rank in _slot_ranks(plan.modules[owner], slot) if rank in slot_of}
        low, high = slot * placed.layout.dp // num_owners, -(-(slot + 1) * placed.layout.dp // num_owners)
        found.append(tuple(sorted(shared)) or tuple(range(low, high)))
    return tuple(found)


def _slot_ranks(module: ModulePlan, dp: int) -> set[int]:
    layout = module.layout
    places = itertools.product(range(layout.tp), range(layout.cp), range(layout.pp))
    return {rank_at(module, tp=tp, cp=cp, dp=dp, pp=pp) for tp, cp, pp in places}


def expert_groups(module: ModulePlan, name: str) -> tuple[tuple[int, ...], ...]:
    """Groups of the expert view of a module: a stage's ranks seen as etp (fastest), ep, expert-dp.

    `name` is one of expt_tp, ep, expt_dp, tp_ep (etp x ep), tp_ep_pp (etp x ep x pp).
    """
    layout = module.layout
    etp, ep = layout.etp, layout.ep
    per_stage = layout.num_ranks // layout.pp
    expt_dp = per_stage // (etp * ep)

    def at(t: int, e: int, d: int, pp: int) -> int:
        return module.ranks.ranks[t + etp * (e + ep * d) + per_stage * pp]

    stages, copies, experts, shards = range(layout.pp), range(expt_dp), range(ep), range(etp)
    if name == "expt_tp":
        return tuple(tuple(at(t, e, d, p) for t in shards) for p in stages for d in copies for e in experts)
    if name == "ep":
        return tuple(tuple(at(t, e, d, p) for e in experts) for p in stages for d in copies for t in shards)
    if name == "expt_dp":
        return tuple(tuple(at(t, e, d, p) for d in copies) for p in stages for e in experts for t in shards)
    if name == "tp_ep":
        return tuple(tuple(at(t, e, d, p) for e in experts for t in shards) for p in stages for d in copies)
    assert name == "tp_ep_pp", name
    return tuple(tuple(at(t, e, d, p) for p in stages for e in experts for t in shards) for d in copies)
