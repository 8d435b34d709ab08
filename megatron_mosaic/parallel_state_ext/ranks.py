"""Plan -> rank lists per module and axis. Pure integers; any rank set, contiguous or not.

Inside a module ranks are laid out tp fastest, then cp, then dp, pp slowest (Megatron's default order), over the
module's sorted rank set. The formula is `plan.layout.position_at`; experts see the same ranks along other axes.
"""

from __future__ import annotations

import itertools

from megatron_mosaic.plan import ModulePlan, Plan
from megatron_mosaic.plan.layout import AXES, EXPERT_AXES, Four, place_at, position_at, rank_at


def axis_groups(module: ModulePlan, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Rank lists of the groups that span `axes` of AXES: every rank of the module is in exactly one of them.

    `axis_groups(m, ("tp",))` are the tensor-parallel groups, `()` gives one group per rank.
    """
    return _groups(module, AXES, module.layout.degrees, axes)


def expert_groups(module: ModulePlan, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The same along `axes` of EXPERT_AXES: a stage's ranks seen as etp (fastest), ep, expert-dp."""
    return _groups(module, EXPERT_AXES, module.layout.expert_degrees, axes)


def _groups(
    module: ModulePlan, names: tuple[str, ...], degrees: Four, axes: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    """A position is a sum over the axes, so each group is one of the positions without `axes`, plus all of `axes`."""
    unknown = set(axes) - set(names)
    assert not unknown, f"unknown axes {sorted(unknown)}"
    others = tuple(name for name in names if name not in axes)
    ranks, steps = module.ranks.ranks, _positions(names, degrees, axes)
    return tuple(tuple(ranks[start + step] for step in steps) for start in _positions(names, degrees, others))


def axis_group_of(module: ModulePlan, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """The one of `axis_groups` that the rank is in."""
    return _group_of(module, AXES, module.layout.degrees, axes, rank)


def expert_group_of(module: ModulePlan, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """The one of `expert_groups` that the rank is in."""
    return _group_of(module, EXPERT_AXES, module.layout.expert_degrees, axes, rank)


def _group_of(
    module: ModulePlan, names: tuple[str, ...], degrees: Four, axes: tuple[str, ...], rank: int
) -> tuple[int, ...]:
    ranks = module.ranks.ranks
    place = place_at(degrees, ranks.index(rank))
    a, b, c, d = (0 if name in axes else at for name, at in zip(names, place, strict=True))
    start = position_at(degrees, (a, b, c, d))
    return tuple(ranks[start + step] for step in _positions(names, degrees, axes))


def _positions(names: tuple[str, ...], degrees: Four, axes: tuple[str, ...]) -> list[int]:
    """Positions of all places that differ along `axes`, and are 0 along the others; ascending."""
    spans = [range(degree if name in axes else 1) for name, degree in zip(names, degrees, strict=True)]
    return [position_at(degrees, (a, b, c, d)) for d, c, b, a in itertools.product(*reversed(spans))]


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
