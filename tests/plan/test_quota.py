"""Shares -> SM counts: at the grain of the hardware, never more than asked, and refused when they do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import QuotaError
from megatron_mosaic.plan.quota import grant_quota, grantable_counts, validate_concurrent

hardware = st.sampled_from([(132, 8), (132, 2), (108, 2), (2, 1), (1, 1), (8, 8), (7, 3)])


@pytest.mark.parametrize(
    ("share", "granted"), [(1, 132), (0.99, 128), (0.5, 64), (0.33, 40), (0.06, 8), (0.001, 8), (128 / 132, 128)]
)
def test_h100(share, granted):
    # 132 SMs, 8 at a time: the numbers are 8 * floor(132 * share / 8), worked out by hand
    assert grant_quota(share, 132, 8) == granted


@given(st.floats(0.001, 1), hardware)
def test_granted_is_a_multiple_and_not_more_than_asked(share, sizes):
    num_sms, grain = sizes
    granted = grant_quota(share, num_sms, grain)
    assert granted == num_sms or granted % grain == 0
    assert grain <= granted <= max(grain, share * num_sms + 1e-6)
    assert granted in grantable_counts(num_sms, grain)


@given(hardware)
def test_every_grantable_count_is_granted_for_its_share(sizes):
    num_sms, grain = sizes
    for count in grantable_counts(num_sms, grain):
        assert grant_quota(count / num_sms, num_sms, grain) == count


@given(st.floats(0.001, 1), st.floats(0.001, 1), hardware)
def test_larger_shares_get_no_less(a, b, sizes):
    assert grant_quota(min(a, b), *sizes) <= grant_quota(max(a, b), *sizes)


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_refuses_shares(share):
    with pytest.raises(QuotaError, match=r"\(0, 1\]"):
        grant_quota(share, 132, 8)


@pytest.mark.parametrize(("num_sms", "grain"), [(0, 1), (8, 0), (4, 8)])
def test_refuses_hardware(num_sms, grain):
    with pytest.raises(QuotaError, match="granularity"):
        grant_quota(0.5, num_sms, grain)
    with pytest.raises(QuotaError, match="granularity"):
        grantable_counts(num_sms, grain)


def test_concurrent_shares_must_fit():
    validate_concurrent({"vision": 0.33, "llm": 0.66}, 132, 8)
    with pytest.raises(QuotaError) as caught:
        validate_concurrent({"vision": 0.5, "llm": 0.75}, 132, 8)
    assert caught.value.got == "64 + 96 = 160 SMs"
    # each gets at least one grain, so small shares can overflow too
    with pytest.raises(QuotaError, match="24 SMs"):
        validate_concurrent({"a": 0.01, "b": 0.01, "c": 0.01}, 16, 8)
