"""The fit of interference finds the constants that made the pairs; its arithmetic is that of a fine simulation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.calibrate.interference import Interference, PairTime, Side, fit_interference, held_out
from megatron_mosaic.cost_model.effects.interference import CoRunner, slow_downs
from megatron_mosaic.errors import ProfileError

BANDWIDTH = 10e9


def side(name: str, one_s: float, moved_bytes: float = 0.0, host_s: float = 0.0) -> Side:
    return Side(name=name, alone_s={1: one_s, 2: one_s / 1.7}, moved_bytes=moved_bytes, host_s=host_s)


SIDES = [
    side("small", 1e-3, 1e6, 0.8e-3),
    side("tiny", 0.9e-3, 1e6, 0.85e-3),
    side("middle", 4e-3, 12e6, 1e-3),
    side("greedy", 5e-3, 40e6, 1e-3),
    side("large", 30e-3, 200e6, 1e-3),
]
PAIRS = [(a, b) for i, a in enumerate(SIDES) for b in SIDES[i:]]


def pairs_of(model: Interference, factor: float = 1.0) -> list[PairTime]:
    return [PairTime(sides=p, granted=(1, 1), beside_s=factor * model.beside_s(p, (1, 1))) for p in PAIRS]


@pytest.mark.parametrize(("residual", "serial"), [(0.0, 0.0), (0.5, 0.0), (1.2, 1.0), (0.3, 0.9)])
def test_the_fit_finds_what_made_the_pairs_and_predicts_those_it_has_not_seen(residual, serial) -> None:
    model = Interference(bandwidth_bytes_per_s=BANDWIDTH, residual=residual, serial_frac=serial)
    pairs = pairs_of(model)
    assert fit_interference(pairs, BANDWIDTH).residual == residual
    assert held_out(pairs, BANDWIDTH) == pytest.approx([pair.beside_s for pair in pairs], rel=0.02)


def test_a_pair_that_no_constant_explains_shows_when_it_is_held_out() -> None:
    pairs = pairs_of(Interference(bandwidth_bytes_per_s=BANDWIDTH, residual=0.5))
    odd = PairTime(sides=pairs[3].sides, granted=(1, 1), beside_s=3 * pairs[3].beside_s)
    predicted = held_out([*pairs[:3], odd, *pairs[4:]], BANDWIDTH)
    assert predicted[3] == pytest.approx(pairs[3].beside_s, rel=0.02) != odd.beside_s


seconds = st.floats(1e-3, 1e-1)
moved = st.floats(0, 1e9)


@given(seconds, seconds, moved, moved, st.floats(0, 3))
def test_both_have_ended_when_a_simulation_in_small_steps_says_so(a_s, b_s, a_bytes, b_bytes, residual) -> None:
    sides = (side("a", a_s, a_bytes), side("b", b_s, b_bytes))
    model = Interference(bandwidth_bytes_per_s=BANDWIDTH, residual=residual)
    slow = slow_downs(
        [CoRunner(alone_s=a_s, moved_bytes=a_bytes), CoRunner(alone_s=b_s, moved_bytes=b_bytes)], BANDWIDTH, residual
    )
    step = max(a_s, b_s) * max(slow) / 2000
    left, now = [a_s, b_s], 0.0
    while max(left) > 0:
        running = [i for i in (0, 1) if left[i] > 0]
        for i in running:
            left[i] -= step / (slow[i] if len(running) == 2 else 1.0)
        now += step
    assert model.beside_s(sides, (1, 1)) == pytest.approx(now, abs=3 * step)


def test_without_demand_beside_is_the_longer_side() -> None:
    model = Interference(bandwidth_bytes_per_s=BANDWIDTH, residual=3.0)
    assert model.beside_s((side("a", 2e-3), side("b", 5e-3)), (1, 1)) == 5e-3


def test_the_hosts_seconds_are_a_bound() -> None:
    model = Interference(bandwidth_bytes_per_s=BANDWIDTH, serial_frac=1.0)
    assert model.beside_s((side("a", 2e-3, host_s=2e-3), side("b", 2e-3, host_s=1e-3)), (1, 1)) == 3e-3


def test_a_grant_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"a on 3\n.*\[1, 2\]"):
        Interference(bandwidth_bytes_per_s=BANDWIDTH).beside_s((side("a", 1e-3), side("b", 1e-3)), (3, 1))
    with pytest.raises(ProfileError, match="no pair"):
        fit_interference([], BANDWIDTH)
