"""Shares -> SM counts: at the grain of the hardware, never more than asked, and refused when they do not fit."""

import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_mosaic.errors import QuotaError
from megatron_mosaic.plan.quota import grant_cores, grant_quota, grant_shares, grantable_counts, shares_of_tracks

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


@pytest.mark.parametrize(
    ("shares", "granted"),
    [  # 132 SMs, 8 at a time, worked out by hand: grains by largest remainder, then the odd 4 to who lacks most
        ((0.5, 0.5), (64, 68)),
        ((1 / 3, 2 / 3), (44, 88)),
        ((0.3, 0.7), (40, 92)),
        ((0.33, 0.33, 0.34), (40, 44, 48)),
        ((0.25, 0.5), (32, 64)),
        ((0.93, 0.07), (124, 8)),
        ((0.0607, 0.9), (8, 120)),
    ],
)
def test_shares_beside_each_other_on_h100(shares, granted):
    assert tuple(grant_shares(dict(enumerate(shares)), 132, 8).values()) == granted


@st.composite
def shares_beside(draw):
    """Hardware and shares of lanes that fit on it, adding to 1 half of the time."""
    num_sms, grain = draw(st.sampled_from([(132, 8), (132, 2), (108, 2), (16, 1), (148, 8), (78, 4)]))
    count = draw(st.integers(1, min(6, num_sms // grain)))
    weights = [draw(st.floats(0.05, 1)) for _ in range(count)]
    total = draw(st.one_of(st.just(1.0), st.floats(0.3, 1)))
    shares = {key: weight / sum(weights) * total for key, weight in enumerate(weights)}
    assume(all(share * num_sms >= grain for share in shares.values()))
    return shares, num_sms, grain


@given(shares_beside())
def test_granted_jointly(case):
    """Nothing is left of a whole GPU; all but one are whole grains; and where the grain divides the GPU, no move of a
    grain between two lanes brings them nearer to their shares (brute force over pairs)."""
    shares, num_sms, grain = case
    granted = grant_shares(shares, num_sms, grain)
    assert sum(granted.values()) <= num_sms
    if sum(shares.values()) >= 1 - 1e-9:
        assert sum(granted.values()) == num_sms
    assert sum(count % grain != 0 for count in granted.values()) <= 1
    assert min(granted.values()) >= grain
    asked = {key: share * num_sms for key, share in shares.items()}
    for a, b in itertools.permutations(shares, 2):
        if granted[a] >= 2 * grain:
            now = abs(granted[a] - asked[a]) + abs(granted[b] - asked[b])
            moved = abs(granted[a] - grain - asked[a]) + abs(granted[b] + grain - asked[b])
            assert moved >= now - 1e-6 or num_sms % grain, (granted, asked)


@pytest.mark.parametrize(
    ("shares", "got", "nearest"),
    [
        ({"vision": 0.5, "llm": 0.75}, "0.5 + 0.75 = 1.25 of 132 SMs", "vision: 0.3939 (52 SMs), llm: 0.6061 (80 SMs)"),
        ({"vision": 0.05, "llm": 0.5}, "0.05 + 0.5 = 0.55 of 132 SMs", "vision: 0.06061 (8 SMs), llm: 0.4848 (64 SMs)"),
    ],
)
def test_what_cannot_be_granted_names_the_nearest_that_can(shares, got, nearest):
    with pytest.raises(QuotaError) as caught:
        grant_shares(shares, 132, 8)
    assert caught.value.got == got and nearest in caught.value.fix
    found = re.findall(r"(\w+): ([0-9.]+) \((\d+) SMs\)", caught.value.fix)
    again = grant_shares({name: int(sms) / 132 for name, _, sms in found}, 132, 8)
    assert again == {name: int(sms) for name, _, sms in found}, "the nearest is not legal"


def test_more_lanes_than_grains_are_refused():
    with pytest.raises(QuotaError, match="at least one grain each"):
        grant_shares({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 16, 8)


def test_cores_are_never_less_than_one():
    assert grant_cores({0: 0.67, 1: 0.33}, 2) == {0: 1, 1: 1}
    assert grant_cores({0: 0.95, 1: 0.04}, 4) == {0: 3, 1: 1}
    assert grant_cores({0: 0.5, 1: 0.5}, 3) == {0: 1, 1: 2}
    with pytest.raises(QuotaError, match="a core for each lane"):
        grant_cores({0: 0.5, 1: 0.5}, 1)


def test_tracks_take_their_modules_shares():
    assert shares_of_tracks({0: [0.6, 1.0], 1: [0.3]}) == {0: 0.6, 1: 0.3}
    assert shares_of_tracks({0: [1.0], 1: [0.3], 2: [0.2]}) == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2})
    assert shares_of_tracks({0: [1.0], 1: [1.0]}) == {0: 0.5, 1: 0.5}
    with pytest.raises(QuotaError, match=r"1\.1 in all"):
        shares_of_tracks({0: [1.0], 1: [0.5], 2: [0.6]})
