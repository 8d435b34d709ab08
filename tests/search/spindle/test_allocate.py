"""C* against closed forms and a linear program; two numbers of devices for each MetaOp against the equations."""

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linprog

from megatron_mosaic.search.spindle.allocate import allocate, discretise, relaxed_optimum_s
from megatron_mosaic.search.spindle.metaops import Curve
from tests.search.spindle.ops import make_op, ops


def test_perfect_scaling_is_the_work_over_the_devices():
    """Every valid number of devices, and so many layers that each MetaOp needs one at least: C* = sum(w L) / N but for
    the chords between valid numbers, which are exact where n* is one."""
    level = [make_op("a", 10, {n: 8 / n for n in range(1, 17)}), make_op("b", 30, {n: 8 / n for n in range(1, 17)})]
    assert relaxed_optimum_s(level, 16) == pytest.approx((80 + 240) / 16, rel=1e-5)


def test_the_slowest_on_its_most_devices_is_a_bound():
    level = [make_op("a", 100, {1: 1.0, 2: 0.9}), make_op("b", 1, {1: 0.1})]
    assert relaxed_optimum_s(level, 64) == pytest.approx(90.0)
    assert relaxed_optimum_s(level[:1], 1) == pytest.approx(100.0)


def test_the_paper_s_example():
    """Section 3.3: n* = 1.5, L = 12 gives 8 layers on two devices and 4 on one, if two are twice as fast."""
    op = make_op("a", 12, {1: 2.0, 2: 1.0})
    best_s = 12 * 1.0 * 0.7 + 12 * 2.0 * 0.3  # (2, 8.4) and (1, 3.6)
    assert [(p.count, p.num_layers) for p in discretise(op, best_s)] == [(2, 8), (1, 4)]


def _least_length_s(level, num_devices) -> float:
    """C* by linear programming where all n* lie between valid numbers: each MetaOp is a mixture of its points (n, T),
    the mixtures of T are at most C / L, those of n sum up to the devices. Chords of convex points are the optimum."""
    sizes = [len(op.curve.counts) for op in level]
    total, start = sum(sizes), 0
    upper, equal, devices = [], np.zeros((len(level), total + 1)), np.zeros(total + 1)
    for m, op in enumerate(level):
        row = np.zeros(total + 1)
        for i, (count, seconds) in enumerate(zip(op.curve.counts, op.curve.seconds)):
            row[start + i], devices[start + i], equal[m, start + i] = seconds * op.num_layers, count, 1.0
        row[total] = -1.0
        upper.append(row)
        start += sizes[m]
    goal = np.append(np.zeros(total), 1.0)
    right = [*[0.0] * len(level), num_devices]
    return float(linprog(goal, np.array([*upper, devices]), right, equal, np.ones(len(level)), bounds=(0, None)).fun)


@settings(max_examples=60, deadline=None)
@given(ops())
def test_bisection_agrees_with_a_linear_program(level):
    best_s = relaxed_optimum_s(level, 16)
    if all(best_s <= op.num_layers * op.curve.seconds[0] for op in level):  # all need one device at least
        assert best_s == pytest.approx(_least_length_s(level, 16), rel=1e-4)
    else:  # the program has no part-time devices
        assert sum(op.curve.counts[0] for op in level) > 16 or best_s <= _least_length_s(level, 16) * (1 + 1e-4)


@settings(max_examples=60, deadline=None)
@given(ops())
def test_pieces_are_all_layers_in_about_the_best_time(level):
    found = allocate(level, 16)
    for op, pieces in found.pieces.items():
        assert sum(piece.num_layers for piece in pieces) == op.num_layers
        assert all(piece.count in op.curve.counts for piece in pieces)
        assert len(pieces) <= 2
        seconds = sum(piece.num_layers * op.curve.at(piece.count) for piece in pieces)
        slowest = max(op.curve.at(piece.count) for piece in pieces)
        assert seconds <= found.best_s * (1 + 1e-5) + slowest  # rounding is at most a layer
        if found.best_s < op.num_layers * op.curve.seconds[0]:
            assert seconds >= found.best_s - slowest


def test_a_curve_keeps_what_is_faster():
    curve = Curve.of({1: 4.0, 2: 2.0, 4: 2.0, 8: 3.0, 16: 1.0})
    assert (curve.counts, curve.seconds) == ((1, 2, 16), (4.0, 2.0, 1.0))
    assert [curve.most_within(n) for n in (0, 1, 3, 15, 40)] == [0, 1, 2, 2, 16]
    assert [curve.devices(s) for s in (8.0, 4.0, 3.0, 2.0, 1.5, 1.0)] == [0.5, 1.0, 1.5, 2.0, 9.0, 16.0]
    assert curve.devices(0.9) == float("inf")
