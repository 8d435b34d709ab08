"""Rank lists of every axis: a table written by hand, Megatron's own generator, and what holds for any layout."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.parallel_state_ext.ranks import axis_groups, expert_groups
from megatron_mosaic.plan import Layout, ModulePlan, RankSet
from megatron_mosaic.plan.layout import AXES, coordinates_of, rank_at

SCATTERED = RankSet.parse("0,2-3,5,8-11")
# Axes of experts' groups -> Megatron's name for them.
EXPERT_GROUPS = {
    ("etp",): "tp",
    ("ep",): "ep",
    ("expt_dp",): "dp",
    ("etp", "ep"): "tp-ep",
    ("etp", "ep", "pp"): "tp-ep-pp",
}


@st.composite
def modules(draw: st.DrawFn) -> ModulePlan:
    """Any layout of up to 24 ranks on any rank set, with any expert view that fits."""
    degrees = {axis: draw(st.integers(1, 3)) for axis in AXES}
    while math.prod(degrees.values()) > 24:
        degrees[max(degrees, key=degrees.__getitem__)] -= 1
    per_stage = math.prod(degrees.values()) // degrees["pp"]
    ep = draw(st.sampled_from([n for n in range(1, per_stage + 1) if per_stage % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, per_stage // ep + 1) if per_stage // ep % n == 0]))
    size = math.prod(degrees.values())
    ranks = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size, unique=True))
    return ModulePlan(ranks=RankSet.of(ranks), layout=Layout(**degrees, ep=ep, etp=etp))


def members(groups):
    """The groups without their order."""
    return {tuple(sorted(group)) for group in groups}


# Laid out by hand, tp fastest, dp, pp slowest: stage 0 is [[0 2] [3 5]], stage 1 is [[8 9] [10 11]] (rows: dp).
@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("tp",), {(0, 2), (3, 5), (8, 9), (10, 11)}),
        (("dp",), {(0, 3), (2, 5), (8, 10), (9, 11)}),
        (("pp",), {(0, 8), (2, 9), (3, 10), (5, 11)}),
        (("cp",), {(0,), (2,), (3,), (5,), (8,), (9,), (10,), (11,)}),
        (("tp", "pp"), {(0, 2, 8, 9), (3, 5, 10, 11)}),
        (("tp", "dp"), {(0, 2, 3, 5), (8, 9, 10, 11)}),
        (("dp", "pp"), {(0, 3, 8, 10), (2, 5, 9, 11)}),
        (AXES, {(0, 2, 3, 5, 8, 9, 10, 11)}),
    ],
)
def test_table_of_tp2_dp2_pp2_on_scattered_ranks(axes, expected) -> None:
    module = ModulePlan(ranks=SCATTERED, layout=Layout(tp=2, dp=2, pp=2))
    assert members(axis_groups(module, axes)) == expected


def test_table_of_cp2_dp2() -> None:
    module = ModulePlan(ranks=RankSet.parse("4,6-7,9"), layout=Layout(cp=2, dp=2))
    assert axis_groups(module, ("cp",)) == ((4, 6), (7, 9))
    assert axis_groups(module, ("dp",)) == ((4, 7), (6, 9))


@pytest.mark.parametrize(
    ("ep", "etp", "axes", "expected"),
    [
        (2, 1, ("ep",), {(0, 2), (3, 5), (8, 9), (10, 11)}),
        (2, 1, ("expt_dp",), {(0, 3), (2, 5), (8, 10), (9, 11)}),
        (2, 1, ("etp",), {(0,), (2,), (3,), (5,), (8,), (9,), (10,), (11,)}),
        (2, 1, ("etp", "ep", "pp"), {(0, 2, 8, 9), (3, 5, 10, 11)}),
        (2, 2, ("etp",), {(0, 2), (3, 5), (8, 9), (10, 11)}),
        (2, 2, ("ep",), {(0, 3), (2, 5), (8, 10), (9, 11)}),
        (2, 2, ("etp", "ep"), {(0, 2, 3, 5), (8, 9, 10, 11)}),
        (4, 1, ("ep",), {(0, 2, 3, 5), (8, 9, 10, 11)}),
        (4, 1, ("expt_dp",), {(0,), (2,), (3,), (5,), (8,), (9,), (10,), (11,)}),
    ],
)
def test_table_of_expert_groups(ep, etp, axes, expected) -> None:
    module = ModulePlan(ranks=SCATTERED, layout=Layout(tp=2, dp=2, pp=2, ep=ep, etp=etp))
    assert members(expert_groups(module, axes)) == expected


@given(modules())
def test_every_rank_is_in_exactly_one_group_of_each_axis_set(module) -> None:
    for size in range(len(AXES) + 1):
        for axes in itertools.combinations(AXES, size):
            groups = axis_groups(module, axes)
            assert sorted(itertools.chain(*groups)) == list(module.ranks.ranks)
            assert {len(group) for group in groups} == {math.prod(getattr(module.layout, axis) for axis in axes)}


@given(modules())
def test_groups_of_two_axis_sets_cross_in_one_rank(module) -> None:
    """A group along some axes and one along the others have one rank in common: together they are coordinates."""
    for axes in itertools.combinations(AXES, 2):
        others = tuple(axis for axis in AXES if axis not in axes)
        for one, other in itertools.product(axis_groups(module, axes), axis_groups(module, others)):
            assert len({*one} & {*other}) == 1


@given(modules())
def test_coordinates_and_ranks_are_inverse(module) -> None:
    seen = set()
    for rank in module.ranks.ranks:
        place = coordinates_of(module, rank)
        seen.add(place)
        assert rank_at(module, tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank
    assert len(seen) == len(module.ranks)
    with pytest.raises(ValueError, match="not in"):
        coordinates_of(module, max(module.ranks.ranks) + 1)


@given(modules())
def test_a_stages_ranks_are_those_whose_coordinates_say_so(module) -> None:
    for stage in range(module.layout.pp):
        by_place = tuple(rank for rank in module.ranks.ranks if coordinates_of(module, rank).pp == stage)
        assert module.stage_ranks(stage).ranks == by_place


@given(modules())
def test_every_rank_is_in_exactly_one_expert_group_of_each_kind(module) -> None:
    layout = module.layout
    degrees = {
        "etp": layout.etp,
        "ep": layout.ep,
        "expt_dp": layout.num_ranks // layout.pp // layout.ep // layout.etp,
        "pp": layout.pp,
    }
    for axes in EXPERT_GROUPS:
        groups = expert_groups(module, axes)
        assert sorted(itertools.chain(*groups)) == list(module.ranks.ranks)
        assert {len(group) for group in groups} == {math.prod(degrees[axis] for axis in axes)}


@given(modules())
def test_groups_are_megatrons_own(module) -> None:
    """The oracle is Megatron's RankGenerator in its default order; its rank numbers are positions in our rank set."""
    from megatron.core.parallel_state import RankGenerator

    layout, order = module.layout, "tp-cp-ep-dp-pp"
    expt_dp = layout.num_ranks // layout.pp // layout.ep // layout.etp
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=expt_dp, pp=layout.pp, cp=1, order=order)

    def theirs(generator, token):
        return members([module.ranks.ranks[position] for position in group] for group in generator.get_ranks(token))

    for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("tp", "pp"), ("cp", "dp"), ("tp", "cp", "dp")):
        assert members(axis_groups(module, axes)) == theirs(dense, "-".join(axes)), axes
    for axes, token in EXPERT_GROUPS.items():
        assert members(expert_groups(module, axes)) == theirs(expert, token), axes
