"""Made-up MetaOps for tests of the allocator and the wavefront, and a bound that no schedule of theirs beats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import linprog

from megatron_mosaic.search.spindle.metaops import Curve, MetaOp


def make_op(name: str, num_layers: int, points: dict[int, float], *, level: int = 0, tp: int = 1) -> MetaOp:
    return MetaOp(task=name, module="m", level=level, num_layers=num_layers, tp=tp, curve=Curve.of(points))


@st.composite
def ops(draw, most_ops: int = 6, num_devices: int = 16) -> tuple[MetaOp, ...]:
    """Curves w/n + a floor, on some of the powers of two, as data parallelism gives them."""
    found = []
    for i in range(draw(st.integers(1, most_ops))):
        work, floor = draw(st.floats(0.5, 20.0)), draw(st.floats(0.01, 1.0))
        counts = [2**k for k in range(draw(st.integers(1, num_devices.bit_length())))]
        points = {n: work / n + floor for n in counts if n <= num_devices}
        found.append(make_op(f"t{i}", draw(st.integers(1, 40)), points))
    return tuple(found)


def area_bound_s(level: Sequence[MetaOp], num_devices: int) -> float:
    """No schedule of a level is shorter. By linear programming: layers go to points (n, T) in real numbers; a MetaOp's
    layers come one after the other, and all devices together have `num_devices` times the length."""
    sizes = [len(op.curve.counts) for op in level]
    total = sum(sizes)
    rows, equal = [], np.zeros((len(level), total + 1))
    area = np.zeros(total + 1)
    start = 0
    for m, op in enumerate(level):
        chain = np.zeros(total + 1)
        for i, (count, seconds) in enumerate(zip(op.curve.counts, op.curve.seconds)):
            chain[start + i], area[start + i], equal[m, start + i] = seconds, count * seconds, 1.0
        chain[total] = -1.0
        rows.append(chain)
        start += sizes[m]
    area[total] = -num_devices
    goal = np.zeros(total + 1)
    goal[total] = 1.0
    layers = [op.num_layers for op in level]
    found = linprog(goal, np.array([*rows, area]), np.zeros(len(level) + 1), equal, layers, bounds=(0, None))
    assert found.success
    return float(found.x[total])
