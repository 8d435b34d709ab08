"""Waves run every layer once on valid numbers of devices, no schedule beats the bound, and none is far above C*."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.model import memory_limit_bytes
from megatron_mosaic.cost_model.waves.step import WaveClock
from megatron_mosaic.search.spindle.find import list_choices
from megatron_mosaic.search.spindle.metaops import by_level, contract
from megatron_mosaic.search.spindle.wavefront import STRATEGIES, schedule_levels, wave_s
from tests.search.spindle.ops import area_bound_s, make_op, ops


@settings(max_examples=80, deadline=None)
@given(ops(), st.sampled_from(STRATEGIES))
def test_waves_are_legal(level, strategy):
    found = schedule_levels(level, 16, strategy)
    done = dict.fromkeys(level, 0)
    for wave in found.waves:
        assert sum(part.count for part in wave) <= 16
        assert len({part.op for part in wave}) == len(wave)
        for part in wave:
            assert part.first_layer == done[part.op]
            assert part.count in part.op.curve.counts
            done[part.op] += part.num_layers
    assert done == {op: op.num_layers for op in level}
    assert found.seconds >= area_bound_s(level, 16) * (1 - 1e-6)


def test_levels_follow_each_other():
    first, second = make_op("a", 3, {1: 1.0}), make_op("b", 2, {1: 1.0}, level=1)
    waves = schedule_levels([second, first], 4, STRATEGIES[0]).waves
    assert [[part.op.task for part in wave] for wave in waves] == [["a"], ["b"]]
    assert [wave_s(wave) for wave in waves] == [3.0, 2.0]


def test_two_that_fill_the_devices_run_beside_each_other():
    level = [make_op("a", 8, {1: 2.0, 2: 1.0, 4: 0.5}), make_op("b", 8, {1: 2.0, 2: 1.0, 4: 0.5})]
    for strategy in STRATEGIES:
        (wave,) = schedule_levels(level, 4, strategy).waves
        assert [part.count for part in wave] == [2, 2]


CELLS = [(name, nodes) for name in ("multitask_clip_4", "multitask_clip_10", "ofasys") for nodes in (1, 2, 4)]
CELLS += [("qwen_val", 4), ("qwen_val", 8)]


@pytest.mark.parametrize(("model", "nodes"), CELLS)
def test_shipped_workloads_come_within_seven_percent_of_the_optimum(model, nodes):
    """As the paper reports of its plans (1.02 to 1.07). C* is checked in test_allocate.py; chords between valid numbers
    make it too long at times, so that a plan may be shorter, but no plan is shorter than the bound."""
    task = load_task([f"model={model}", "cluster=a800_8x8", f"cluster.num_nodes={nodes}"])
    clock = WaveClock(task.cost_model())
    limit_bytes = memory_limit_bytes(task.cluster, task.search.memory_frac)
    choices = list_choices(clock, task.search, limit_bytes)
    level_ops = next(filter(None, (contract(clock.model, clock.uses, each, limit_bytes) for each in choices)))
    devices = task.cluster.num_ranks
    found = min((schedule_levels(level_ops, devices, each) for each in STRATEGIES), key=lambda each: each.seconds)
    assert found.seconds <= 1.07 * found.best_s
    assert found.seconds >= sum(area_bound_s(level, devices) for level in by_level(level_ops))
