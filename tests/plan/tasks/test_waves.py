"""Plans in waves: what is written is read back, and a plan that does not run every layer once, in order, is refused."""

from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Layout, RankSet
from megatron_mosaic.plan.plan_file import parse_plan
from megatron_mosaic.plan.tasks.wave_file import format_waves, parse_waves
from megatron_mosaic.plan.tasks.waves import validate_waves
from megatron_mosaic.plan.training import TrainingSetup
from tests.task_cases import TASKS, TWO_WAVES, cut, slice_of


def _with(*waves):
    return replace(TWO_WAVES, waves=waves)


def test_round_trip():
    plan = replace(TWO_WAVES, training=TrainingSetup(), cluster="a800_8x8")
    assert parse_waves(format_waves(plan)) == plan
    validate_waves(plan, TASKS)
    assert [str(ranks) for ranks in plan.instances("vision")] == ["0-1", "2"]


FIRST, SECOND = TWO_WAVES.waves
PAIRED, TEXT = FIRST[1:]


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ((FIRST,), "task caption: llm.*\n.*0 layers in all waves"),
        ((SECOND, FIRST), "vision not yet"),
        (((*FIRST, slice_of("caption", "llm", "4")), SECOND), "vision not yet"),
        ((FIRST, SECOND, SECOND), "4 layers done before"),
        (((FIRST[0], cut(PAIRED, 0, 2), TEXT), SECOND), "task pairs: vision.*\n.*2 layers"),
        (((FIRST[0], cut(PAIRED, 2, 2), TEXT), SECOND), "0 layers done before"),
        (((FIRST[0], slice_of("pairs", "vision", "2-4", layout=Layout(dp=3))), SECOND), "the 4 samples of the task"),
        (((*FIRST, slice_of("pairs", "llm", "4")), SECOND), "no such module of a task"),
        ((FIRST, (slice_of("caption", "llm", "0-1", layout=Layout(tp=2)),), ()), None),
        (
            (
                (FIRST[0], TEXT, cut(slice_of("pairs", "vision", "4-5", layout=Layout(tp=2)), 0, 4)),
                SECOND,
            ),
            "one tp|as the other instances",
        ),
    ],
)
def test_order_is_checked(waves, message):
    plan = _with(*waves)
    if message is None:
        validate_waves(plan, TASKS)
        return
    with pytest.raises(PlanError, match=message) as caught:
        validate_waves(plan, TASKS)
    assert caught.value.fix


def test_ranks_of_a_wave_are_disjoint_and_of_the_world():
    with pytest.raises(PlanError, match="wave 0, pairs: text"):
        _with((FIRST[0], replace(TEXT, ranks=RankSet.parse("1"))), SECOND)
    with pytest.raises(PlanError, match="world_size 6"):
        _with((replace(TEXT, ranks=RankSet.parse("6")),))


def test_a_slice_is_laid_out_in_whole_groups():
    with pytest.raises(PlanError, match="whole groups of tp 2"):
        slice_of("caption", "llm", "1-2", layout=Layout(tp=2))
    with pytest.raises(PlanError, match="tp x dp"):
        slice_of("caption", "llm", "0-1", layout=Layout(pp=2))
    with pytest.raises(PlanError, match="layers"):
        replace(TEXT, num_layers=0)


def test_files_are_refused_by_name():
    text = format_waves(TWO_WAVES)
    with pytest.raises(PlanError, match=r"waves\.0\.0\.layer"):
        parse_waves(text.replace("layers:", "layer:", 1))
    with pytest.raises(PlanError, match="one span"):
        parse_waves(text.replace("0-3", "'0,2'", 1))
    with pytest.raises(PlanError, match="schedule"):
        parse_waves(text.replace("schedule: waves", "schedule: 1f1b"))
    with pytest.raises(PlanError, match="a plan in waves, for several tasks"):
        parse_plan(text)


def test_another_workload_is_refused():
    with pytest.raises(PlanError, match="two_tasks"):
        validate_waves(replace(TWO_WAVES, digest="000000000000"), TASKS)
    with pytest.raises(PlanError, match="global_batch_size"):
        validate_waves(replace(TWO_WAVES, global_batch_size=20), TASKS)
