"""Regret and rank correlation of hand-made groups, and folds that keep a layout together."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.constants import BOUNDS, at_bound, fold_of
from megatron_mosaic.cost_model.published.regret import Group, group_layouts
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case

ROWS = load_rows(PUBLISHED / "vtrain_multi_node_a100.csv")


def cases(*changes: dict[str, str]) -> list[Case]:
    found = [try_case(ROWS[0] | each) for each in changes]
    assert all(isinstance(each, Case) for each in found), found
    return [each for each in found if isinstance(each, Case)]


def test_regret_is_what_the_choice_costs():
    # the second is predicted to be fastest and takes 3 s where 2 s were possible
    group = Group(measured_s=(2.0, 3.0, 4.0), predicted_s=(2.5, 2.0, 9.0))
    assert group.regret_frac == 0.5
    assert group.rank_correlation == pytest.approx(0.5)
    assert Group(measured_s=(2.0, 3.0), predicted_s=(5.0, 6.0)).regret_frac == 0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=9))
def test_rank_correlation_is_scipys(pairs):
    measured, predicted = ([float(x) for x in side] for side in zip(*pairs))
    found = Group(measured_s=tuple(measured), predicted_s=tuple(predicted)).rank_correlation
    if len({*measured}) > 1 and len({*predicted}) > 1:
        assert found == pytest.approx(spearmanr(measured, predicted).statistic)
    else:
        assert found == 0


def test_groups_hold_what_differs_in_layout_alone():
    tp2 = {"tp": "2", "dp": "32", "n_gpus": "64", "num_microbatches": "2", "mbs": "8"}
    base, other, again, larger = cases({}, tp2, {}, tp2 | {"gbs": "1024", "num_microbatches": "4"})
    (group,) = group_layouts([(base, 1.0), (other, 2.0), (replace(again, measured_s=9.0), 1.0), (larger, 5.0)])
    assert group.predicted_s == (1.0, 2.0)
    assert group.measured_s == ((base.measured_s + 9.0) / 2, other.measured_s)


def test_batches_of_a_layout_are_in_one_fold():
    one, twice, wider = cases({}, {"gbs": "1024", "num_microbatches": "2"}, {"mbs": "4", "num_microbatches": "2"})
    assert fold_of(one) == fold_of(twice) == fold_of(wider)
    assert len({fold_of(case) for row in ROWS if isinstance(case := try_case(row), Case)}) > 1


def test_a_constant_at_the_end_of_its_range_is_told():
    for name, (lower, usual, upper) in BOUNDS.items():
        assert lower < usual < upper
        assert at_bound(name, lower) and at_bound(name, upper) and not at_bound(name, usual)
