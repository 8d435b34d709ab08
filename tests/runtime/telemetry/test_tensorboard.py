"""A run of two ranks with --tensorboard-dir: what its files hold, read back, against the run's own timelines."""

import json
from pathlib import Path

import pytest

from megatron_mosaic.cli.predicted import build_prediction
from megatron_mosaic.config import load_task, load_workload
from megatron_mosaic.cost_model.hardware.profile import save_profile
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.runtime.telemetry.prediction import format_prediction
from megatron_mosaic.runtime.telemetry.timelines import read_timelines
from tests.cases import make_plan, make_profile

pytest.importorskip("tensorboard", reason="Megatron's TensorBoard writer needs tensorboard")
pytestmark = pytest.mark.dist
STEPS, INTERVAL = 7, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Vision and generator on rank 0, llm on both: steps 2-4 and 5-7 are reported."""
    cpu.install()
    from megatron_mosaic.any2any import pretrain

    directory = tmp_path_factory.mktemp("run")
    words = ["model=any2any-digits", "cluster=local", "cluster.num_ranks=2", "workload.global_batch_size=8"]
    workload = load_workload(words)
    save_profile(make_profile(workload), directory / "profile.yaml")
    task = load_task(words, profile_path=directory / "profile.yaml")
    plan = task.complete(
        make_plan(
            {"vision": ("0", Layout()), "llm": ("0-1", Layout(dp=2)), "generator": ("0", Layout())},
            workload=workload,
            world_size=2,
            global_batch_size=8,
            micro_batch_size=2,
        )
    )
    save_plan(plan, directory / "plan.yaml")
    prediction = build_prediction(plan, task, simulate(plan, task.cost_model()))
    (directory / "predicted.json").write_text(format_prediction(prediction))
    command = ["--mosaic-plan", str(directory / "plan.yaml"), "--mosaic-report", str(directory)]
    command += ["--mosaic-report-interval", str(INTERVAL), "--mosaic-predicted", str(directory / "predicted.json")]
    command += ["--tensorboard-dir", str(directory / "board"), "--train-iters", str(STEPS), "--eval-iters", "0"]
    run_forked(2, with_command_line, command, pretrain.main, timeout_s=300)
    return directory


def read_board(directory: Path) -> dict[str, dict[int, float]]:
    """Scalar -> iteration -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory))
    board.Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def test_tensorboard_holds_the_scalars_of_every_module(run) -> None:
    """Beside Megatron's own (`lm loss`), by the same writer; values are single precision there."""
    found = read_board(run / "board")
    names = {"mosaic/step_s", "mosaic/mfu", "mosaic/predicted_over_measured/step"}
    of_modules = ("busy_frac", "bubble_frac", "imbalance", "boundary_bytes", "predicted_over_measured")
    names |= {f"mosaic/{number}/{module}" for number in of_modules for module in ("vision", "llm", "generator")}
    assert {name for name in found if name.startswith("mosaic/")} == names
    assert "lm loss" in found
    lines = [json.loads(line) for line in (run / "scalars.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 7]
    for line in lines:
        for name in names:
            assert found[name][line["iteration"]] == pytest.approx(line[name], rel=1e-6), name
        for module in ("vision", "llm", "generator"):
            busy, bubble = (line[f"mosaic/{number}/{module}"] for number in ("busy_frac", "bubble_frac"))
            assert 0 < busy <= 1 and 0 <= bubble < 1 and busy + bubble < 1 + 1e-9
        predicted = json.loads((run / "predicted.json").read_text())
        mfu = predicted["step_flops"] / (line["mosaic/step_s"] * predicted["peak_flops_per_s"])
        assert line["mosaic/mfu"] == pytest.approx(mfu)


def test_rows_for_the_other_rank_are_counted_and_no_others(run) -> None:
    """Vision's rows and the llm's go to rank 1's half and back, and its gradients: as many bytes both ways."""
    for line in map(json.loads, (run / "scalars.jsonl").read_text().splitlines()):
        sent = {module: line[f"mosaic/boundary_bytes/{module}"] for module in ("vision", "llm", "generator")}
        assert min(sent.values()) > 0
        assert sent["vision"] + sent["generator"] == sent["llm"], "a gradient comes back for every row"


def test_both_ranks_left_the_timeline_of_a_step_of_each_report(run) -> None:
    (found,) = read_timelines(run)
    first, second = found.steps
    assert 2 <= first.iteration <= 4 and 5 <= second.iteration <= 7
    for step in found.steps:
        assert step.missing == () and {span.rank for span in step.timeline.spans} == {0, 1}
        assert step.timeline.end_s == pytest.approx(step.step_s, rel=0.2), "one host: the ranks' clocks agree"
        assert {"vision.0", "llm.0", "generator.0", "~optimizer"} <= set(step.timeline.seconds_by_lane())
