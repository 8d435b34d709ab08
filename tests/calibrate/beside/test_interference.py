"""The fit of interference finds the constants that made the pairs; its arithmetic is that of a fine simulation."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.calibrate.beside.interference import Fit, PairTime, Side, error_frac
from megatron_mosaic.cost_model.effects.interference import CoRunner, Interference
from megatron_mosaic.errors import ProfileError

BANDWIDTH = 10e9
MB = 1 << 20


def side(name: str, one_s: float, moved: float = 0.0, host_s: float = 0.0, footprint: float = math.inf) -> Side:
    alone = {1: one_s, 2: one_s / 1.7}
    return Side(name=name, alone_s=alone, moved_bytes=moved, host_s=host_s, footprint_bytes=footprint)


SIDES = [
    side("small", 1e-3, 4e6, 0.8e-3, 0.4e6),
    side("tiny", 0.9e-3, 4e6, 0.85e-3, 0.2e6),
    side("middle", 4e-3, 12e6, 1e-3, 6e6),
    side("greedy", 5e-3, 40e6, 1e-3, 20e6),
    side("large", 30e-3, 200e6, 1e-3, 100e6),
]
PAIRS = [(a, b) for i, a in enumerate(SIDES) for b in SIDES[i:]]


def model(residual: float = 0.0, serial: float = 0.0, cache: float = 0.0) -> Interference:
    return Interference(
        bandwidth_bytes_per_s=BANDWIDTH, residual=residual, serial_frac=serial, cache_bytes=cache, is_measured=True
    )


def pairs_of(made: Interference) -> list[PairTime]:
    pairs = [PairTime(sides=p, granted=(1, 1), beside_s=1.0) for p in PAIRS]
    return [PairTime(sides=p.sides, granted=p.granted, beside_s=p.predict_s(made)) for p in pairs]


@pytest.mark.parametrize(
    "made", [model(), model(0.5), model(1.2, 1.0), model(0.3, 0.8, 4 * MB), model(0.7, 0.0, MB)], ids=range(5)
)
def test_the_fit_finds_what_made_the_pairs_and_predicts_those_it_has_not_seen(made) -> None:
    pairs = pairs_of(made)
    fit = Fit(pairs, BANDWIDTH)
    assert fit.best() == made
    assert error_frac(pairs, fit.held_out()) < 0.02


def test_a_pair_that_no_constant_explains_shows_when_it_is_held_out() -> None:
    pairs = pairs_of(model(0.5))
    odd = PairTime(sides=pairs[3].sides, granted=(1, 1), beside_s=3 * pairs[3].beside_s)
    held_out = Fit([*pairs[:3], odd, *pairs[4:]], BANDWIDTH).held_out()
    assert odd.predict_s(held_out[3]) == pytest.approx(pairs[3].beside_s, rel=0.02) != odd.beside_s


def test_the_choice_is_right_on_every_pair_whose_gain_is_no_noise() -> None:
    """Made-up measurements: what one model says, with an error of up to 4 % that no constant explains."""
    noise, made = 0.04, model(0.8, 0.6, MB)
    pairs = [
        PairTime(sides=p.sides, granted=p.granted, beside_s=p.beside_s * (1 + noise * (-1) ** i))
        for i, p in enumerate(pairs_of(made))
    ]
    gains = [sum(s.on(2) for s in p.sides) / p.beside_s for p in pairs]
    predicted = [p.predict_gain(m, 2) for p, m in zip(pairs, Fit(pairs, BANDWIDTH).held_out(), strict=True)]
    clear = [(gain > 1, found > 1) for gain, found in zip(gains, predicted, strict=True) if abs(gain - 1) > 2 * noise]
    assert {True, False} == {gains for gains, _ in clear}, "the pairs should gain and lose"
    assert all(gains == chosen for gains, chosen in clear)


seconds = st.floats(1e-3, 1e-1)
moved = st.floats(0, 1e9)


@given(st.lists(st.tuples(seconds, moved, st.floats(0, 1)), min_size=2, max_size=3), st.floats(0, 3))
def test_all_have_ended_when_a_simulation_in_small_steps_says_so(drawn, residual) -> None:
    made = model(residual, 0.5)
    lanes = [CoRunner(alone_s=s, moved_bytes=size, host_s=frac * s) for s, size, frac in drawn]
    step = max(lane.alone_s for lane in lanes) * max(made.slow_downs(lanes)) / 2000
    left, now = [lane.alone_s for lane in lanes], 0.0
    while max(left) > 0:
        running = [i for i, work in enumerate(left) if work > 0]
        for i, factor in zip(running, made.slow_downs([lanes[i] for i in running]), strict=True):
            left[i] -= step / factor
        now += step
    assert made.until_all_end_s(lanes) == pytest.approx(now, abs=2 * len(lanes) * step)


def test_without_demand_beside_is_the_longer_side() -> None:
    pair = PairTime(sides=(side("a", 2e-3), side("b", 5e-3)), granted=(1, 1), beside_s=1.0)
    assert pair.predict_s(model(3.0)) == 5e-3


def test_the_hosts_seconds_are_a_bound() -> None:
    sides = (side("a", 2e-3, host_s=2e-3), side("b", 2e-3, host_s=1e-3))
    pair = PairTime(sides=sides, granted=(1, 1), beside_s=1.0)
    assert pair.predict_s(model(serial=1.0)) == pytest.approx(3e-3)
    assert pair.predict_s(model(serial=0.5)) == pytest.approx(2e-3)


def test_a_grant_that_was_not_measured_is_refused() -> None:
    pair = PairTime(sides=(side("a", 1e-3), side("b", 1e-3)), granted=(3, 1), beside_s=1.0)
    with pytest.raises(ProfileError, match=r"a on 3\n.*\[1, 2\]"):
        pair.predict_s(model())
    with pytest.raises(ProfileError, match="no pair"):
        Fit([], BANDWIDTH)
    with pytest.raises(ProfileError, match="every pair left out"):
        Fit(pairs_of(model())[:1], BANDWIDTH).held_out()
