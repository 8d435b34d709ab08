"""Overheads of a made-up run: with them the profile predicts that run, and nothing else is put into them."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.calibrate.one_rank import one_rank_plan
from megatron_mosaic.calibrate.overheads import fit_overheads
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import Overheads
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.errors import ProfileError
from tests.cases import WORKLOAD, make_profile

PLAN = one_rank_plan(
    WORKLOAD.name, [module.name for module in WORKLOAD.modules], global_batch_size=16, micro_batch_size=4
)
PROFILE = make_profile()


def _simulate(profile):
    return simulate(PLAN, CostModel(WORKLOAD, local_cluster(profile, 1), profile))


def _spans(profile, data_s=0.0):
    """Of a run that takes what a profile says; `~data` as long as given where it says none."""
    spans = sorted(_simulate(profile).timeline().spans, key=lambda span: span.start_s)
    if spans[0].label != "~data":
        begin = replace(spans[0], lane="~data", label="~data", start_s=0.0, end_s=data_s)
        spans = [begin, *[replace(s, start_s=s.start_s + data_s, end_s=s.end_s + data_s) for s in spans]]
    return spans


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1e-2), st.floats(0, 1e-1), st.floats(1e-6, 1e-3))
def test_what_a_run_took_beyond_its_parts_is_found(action_s, step_s, sample_s):
    true = Overheads(action_s=action_s, step_s=step_s, sample_s=sample_s)
    found = fit_overheads(_simulate(PROFILE), _spans(PROFILE.model_copy(update={"overheads": true})))
    for key in ("action_s", "step_s", "sample_s"):
        assert getattr(found, key) == pytest.approx(getattr(true, key), abs=1e-12)


def test_gaps_between_actions_count():
    spans = _spans(PROFILE.model_copy(update={"overheads": Overheads(sample_s=1e-4)}))
    actions = [i for i, span in enumerate(spans) if not span.label.startswith("~")]
    later = spans[: actions[3]] + [
        replace(span, start_s=span.start_s + 0.24, end_s=span.end_s + 0.24) for span in spans[actions[3] :]
    ]
    found = fit_overheads(_simulate(PROFILE), later)
    assert found.action_s == pytest.approx(0.24 / len(actions))
    assert found.step_s == pytest.approx(0.0, abs=1e-12)


def test_a_run_that_was_faster_than_its_parts_has_none():
    slow = make_profile()
    fast = [replace(span, start_s=span.start_s / 2, end_s=span.end_s / 2) for span in _spans(slow, data_s=0.01)]
    assert fit_overheads(_simulate(slow), fast) == Overheads(sample_s=0.005 / 16)


@pytest.mark.parametrize("lost", ["~data", "~optimizer", "llm.0F1"])
def test_another_run_is_refused(lost):
    spans = [span for span in _spans(PROFILE, data_s=0.01) if span.label != lost]
    with pytest.raises(ProfileError, match="overheads"):
        fit_overheads(_simulate(PROFILE), spans)
