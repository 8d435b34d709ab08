"""Lanes on one GPU: closed forms of two, and what max-min fairness promises of any number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.interference import CoRunner, Interference, share_max_min
from megatron_mosaic.errors import ConfigError


def slow_downs(lanes, bandwidth, residual=0.0, **constants):
    made = Interference(bandwidth_bytes_per_s=bandwidth, residual=residual, **constants)
    return made.slow_downs(lanes)


demands = st.lists(st.floats(0, 10), min_size=1, max_size=6)


def test_two_greedy_lanes_take_twice_as_long():
    lanes = [CoRunner(alone_s=1, moved_bytes=100), CoRunner(alone_s=2, moved_bytes=200)]
    assert slow_downs(lanes, 100) == pytest.approx((2, 2))


def test_a_modest_lane_is_not_slowed_by_a_greedy_one():
    lanes = [CoRunner(alone_s=1, moved_bytes=30), CoRunner(alone_s=1, moved_bytes=100)]
    assert slow_downs(lanes, 100) == pytest.approx((1, 100 / 70))


def test_enough_bandwidth_is_no_interference_but_for_the_residual():
    lanes = [CoRunner(alone_s=1, moved_bytes=40), CoRunner(alone_s=1, moved_bytes=60)]
    assert slow_downs(lanes, 100) == (1, 1)
    assert slow_downs(lanes, 100, residual=0.5) == pytest.approx((1.3, 1.2))


def test_alone_is_alone():
    assert slow_downs([CoRunner(alone_s=1, moved_bytes=70)], 100, residual=0.5) == (1,)
    assert slow_downs([CoRunner(alone_s=1, moved_bytes=0)], 100) == (1,)


def test_what_fits_into_the_cache_does_not_reach_memory():
    lanes = [CoRunner(alone_s=1, moved_bytes=100, footprint_bytes=size) for size in (10, 40)]
    assert slow_downs(lanes, 100, cache_bytes=10) == pytest.approx((1, 1))  # 0 and 75 of 100
    assert slow_downs(lanes, 100) == pytest.approx((2, 2))


def test_alone_nobody_moves_more_than_the_memory_can():
    lanes = [CoRunner(alone_s=1, moved_bytes=300), CoRunner(alone_s=1, moved_bytes=50)]
    assert slow_downs(lanes, 100) == pytest.approx((2, 1))  # 100 are asked for and 50 left


def test_launches_of_one_host_take_turns():
    lanes = [CoRunner(alone_s=1, moved_bytes=0, host_s=0.8), CoRunner(alone_s=2, moved_bytes=0, host_s=1.6)]
    assert slow_downs(lanes, 100, serial_frac=1.0) == pytest.approx((1.6, 1.6))
    assert slow_downs(lanes, 100, serial_frac=0.5) == (1, 1)


def test_slower_lanes_ask_for_less():
    made = Interference(bandwidth_bytes_per_s=100)
    lanes = [CoRunner(alone_s=1, moved_bytes=100)] * 2
    assert made.slow_downs(lanes, speed=0.5) == (1, 1)  # half of it each
    assert made.slow_downs(lanes, speed=0.75) == pytest.approx((1.5, 1.5))


def test_a_pair_gains_by_what_turns_take_over_what_both_take():
    made = Interference(bandwidth_bytes_per_s=100)
    lanes = [CoRunner(alone_s=2, moved_bytes=200), CoRunner(alone_s=3, moved_bytes=0)]
    assert made.until_all_end_s(lanes) == 3 and made.gain_beside([1.5, 2], lanes) == pytest.approx(3.5 / 3)
    greedy = [CoRunner(alone_s=2, moved_bytes=200), CoRunner(alone_s=3, moved_bytes=300)]
    assert made.until_all_end_s(greedy) == pytest.approx(5)  # 4 together, 1 of work left for one of them
    assert made.gain_beside([2, 3], greedy) == pytest.approx(1)


@given(demands, st.floats(0.1, 20))
def test_shares_are_max_min_fair(wanted, capacity):
    granted = share_max_min(wanted, capacity)
    assert sum(granted) == pytest.approx(min(sum(wanted), capacity))
    for demand, given_ in zip(wanted, granted, strict=True):
        assert given_ <= demand + 1e-12
        if given_ < demand - 1e-9:  # who is not satisfied has as much as anybody
            assert given_ == pytest.approx(max(granted))
            assert given_ >= capacity / len(wanted) - 1e-9


@given(demands)
def test_more_bandwidth_is_never_slower(wanted):
    lanes = [CoRunner(alone_s=1, moved_bytes=demand) for demand in wanted]
    for slow, fast in zip(slow_downs(lanes, 3), slow_downs(lanes, 6), strict=True):
        assert slow >= fast * (1 - 1e-9)
        assert fast >= 1


def test_a_lane_without_time_is_refused():
    with pytest.raises(ConfigError, match="co-running lane"):
        CoRunner(alone_s=0, moved_bytes=1)
