"""The reference model as the planner sees it."""

import subprocess
import sys

import pytest

from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix, workload
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice, validate_plan


def test_modules_and_edges_in_order():
    model = workload(Any2AnySizes(), 16)
    assert [module.name for module in model.modules] == ["vision", "llm", "generator"]
    assert model.edge_pairs == (("vision", "llm"), ("llm", "generator"))
    assert {(edge.rows_per_item, edge.width) for edge in model.edges} == {(16, 64)}
    assert [model.items_of(edge) for edge in model.edges] == ["vision", "generator"]


@pytest.mark.parametrize("axis", ["tp", "cp", "pp", "dp"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_default_sizes_may_be_split_up_to_four_ways(axis, degree):
    layout = ModulePlan(ranks=RankSet.of(range(degree)), layout=Layout(**{axis: degree}))
    plan = Plan(
        workload="any2any-digits",
        world_size=4,
        global_batch_size=16,
        micro_batch_size=4,
        schedule=ScheduleChoice("one_f_one_b"),
        modules={name: layout for name in ("vision", "llm", "generator")},
    )
    validate_plan(plan, workload(Any2AnySizes(), 16))


def test_sizes_are_read_without_torch():
    check = "import sys, megatron_mosaic.any2any.sizes; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"text_only_frac": 0.8, "two_image_frac": 0.3}, "1 in sum"),
        ({"text_only_frac": -0.1}, "at least 0"),
        ({"generate_frac": 0.0}, "the generator would never run"),
    ],
)
def test_mix_without_meaning_is_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        DigitsMix(**shares)
