"""Reports of made-up steps by three forked ranks, against sums by hand over all of their spans."""

import contextlib
import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout
from megatron_mosaic.runtime.telemetry.numbers import lanes_of
from megatron_mosaic.runtime.telemetry.periodic import SCALARS_FILE, PeriodicReport
from megatron_mosaic.runtime.telemetry.prediction import Prediction, format_prediction, load_prediction
from megatron_mosaic.runtime.telemetry.step_report import (
    LOSSES_FILE,
    MEASURES_FILE,
    TIMELINE_FILE,
    StepReport,
)
from megatron_mosaic.runtime.telemetry.timelines import read_timelines
from megatron_mosaic.schedules.timeline import Span
from tests.cases import make_plan
from tests.forked import run_gloo

# Vision on rank 0, llm on ranks 1 and 2, generator on rank 0: ranks 1 and 2 are a class
PLAN = make_plan({"vision": ("0", Layout()), "llm": ("1-2", Layout(dp=2)), "generator": ("0", Layout())}, world_size=3)
SECONDS = {0: ("vision.0", 1.0), 1: ("llm.0", 2.0), 2: ("llm.0", 3.0)}  # rank -> its lane and how long it takes
PREDICTED = Prediction(
    step_s=2.0,
    lane_s={"vision.0": 0.5, "llm.0": 2.0, "generator.0": 0.0, "~optimizer": 0.5},
    step_flops=8.0,
    peak_flops_per_s=4.0,
    source="made up",
)


class Recorder:
    """A TensorBoard writer."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        pass


def spans_of(rank: int, factor: float = 1.0) -> list[Span]:
    """One step: data for 1 s, the lane, and the optimizer from second 4 to 5; each rank's clock is its own."""
    zero, (lane, seconds) = 100.0 * rank, SECONDS[rank]
    return [
        Span(rank, "~data", zero, zero + factor, "~data"),
        Span(rank, lane, zero + factor, zero + factor * (1 + seconds), f"{lane}F0"),
        Span(rank, "~optimizer", zero + 4 * factor, zero + 5 * factor, "~optimizer"),
    ]


def report_steps(directory: str, factors: list[float]) -> None:
    """Steps of these lengths, two a report; the last rank writes to TensorBoard."""
    rank, recorder = dist.get_rank(), Recorder()
    world = dist.group.WORLD
    report = PeriodicReport(
        PLAN,
        world,
        interval=2,
        directory=Path(directory),
        predicted=PREDICTED,
        writer=lambda: recorder if rank == 2 else None,
    )
    for step, factor in enumerate(factors):
        report.add(step + 1, spans_of(rank, factor), {"vision": 100.0 * step} if rank == 0 else {}, {"vision": 1.5})
    report.report()
    report.report()  # nothing is left
    if rank == 2:
        (Path(directory) / "recorded.json").write_text(json.dumps(recorder.seen))


def test_what_ranks_find_together_is_what_all_spans_say(tmp_path) -> None:
    """Four steps: the first is warm-up, the next two a report, the last one the rest."""
    run_gloo(3, report_steps, str(tmp_path), [9.0, 1.0, 2.0, 1.0])
    first, rest = (json.loads(line) for line in (tmp_path / SCALARS_FILE).read_text().splitlines())
    assert (first.pop("iteration"), rest.pop("iteration")) == (3, 4)
    expected = {
        "mosaic/step_s": 5.0,
        "mosaic/mfu": 8.0 / (5.0 * 4.0),
        "mosaic/busy_frac/vision": 1 / 5,
        "mosaic/busy_frac/llm": (2 / 5 + 3 / 5) / 2,
        "mosaic/bubble_frac/vision": 2 / 5,  # data 1, vision 1, optimizer 1 of 5
        "mosaic/bubble_frac/llm": (1 / 5 + 0 / 5) / 2,
        "mosaic/boundary_bytes/vision": 100.0,
        "mosaic/boundary_bytes/llm": 0.0,
        "mosaic/imbalance/vision": 1.5,
        "mosaic/predicted_over_measured/step": 2.0 / 5.0,
        "mosaic/predicted_over_measured/vision": 0.5 / 1.0,
        "mosaic/predicted_over_measured/llm": 2.0 / 2.5,
    }
    assert rest == pytest.approx(expected)
    assert first["mosaic/step_s"] == pytest.approx(7.5)
    assert first["mosaic/busy_frac/llm"] == pytest.approx(expected["mosaic/busy_frac/llm"])
    recorded = json.loads((tmp_path / "recorded.json").read_text())
    assert {tag: value for tag, value, at in recorded if at == 4} == rest
    assert {at for *_, at in recorded} == {3, 4}


def test_timelines_are_of_one_rank_of_each_class(tmp_path) -> None:
    """Of steps 2 and 3 (5 and 10 s) the later is the median; rank 2 is as rank 1 and writes nothing."""
    run_gloo(3, report_steps, str(tmp_path), [9.0, 1.0, 2.0])
    (found,) = read_timelines(tmp_path)
    assert found.plan == PLAN
    (step,) = found.steps
    assert (step.iteration, step.step_s, step.missing) == (3, pytest.approx(10.0), ())
    assert {str(ranks) for ranks in step.timeline.alike.values()} == {"0", "1-2"}
    assert {span.rank for span in step.timeline.spans} == {0, 1}
    assert step.timeline.seconds_by_lane()["vision.0"] == pytest.approx(2.0, abs=1e-5)  # the wall clock's resolution


def test_a_directory_without_timelines_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no timelines"):
        list(read_timelines(tmp_path))


def say_worst(directory: str) -> None:
    report = PeriodicReport(
        PLAN, dist.group.WORLD, interval=1, directory=None, predicted=PREDICTED, writer=lambda: None
    )
    with (Path(directory) / f"said-{dist.get_rank()}").open("w") as out:
        with contextlib.redirect_stdout(out):
            for step in (1, 2):
                report.add(step, spans_of(dist.get_rank()), {}, {})


def test_the_line_names_the_worst_rank_of_each_lane(tmp_path) -> None:
    run_gloo(3, say_worst, str(tmp_path))
    said = (tmp_path / "said-0").read_text()
    assert said.startswith("> mosaic: steps 2-2: step 5 s (predicted 2 s, -60%); llm.0 2.5 s (predicted 2 s), ")
    assert "worst rank 2 3 s (1.20x)" in said and "vision.0 1 s (predicted 500 ms), worst rank 0" in said
    assert (tmp_path / "said-1").read_text() == (tmp_path / "said-2").read_text() == ""


def leave_report(directory: str) -> None:
    """Steps of 45, 5, 15, 10, 25 and 20 s on ranks of which one counts losses, too."""
    rank = dist.get_rank()
    report = StepReport(directory, PLAN, dist.group.WORLD)
    for step, factor in enumerate((9.0, 1.0, 3.0, 2.0, 5.0, 4.0)):
        report.add_losses(step + 1, {"lm loss": 2.5})
        report.add_spans(spans_of(rank, factor))
    report.write({"peak": {"llm": 3 + rank, "vision": 4}}, 0.25 * rank)


def test_the_report_at_the_end_is_of_the_median_step(tmp_path) -> None:
    """The first is warm-up, the median of the rest is the third. Of ranks 1 and 2, rank 1 speaks."""
    run_gloo(3, leave_report, str(tmp_path))
    losses = [json.loads(line) for line in (tmp_path / LOSSES_FILE).read_text().splitlines()]
    assert losses == [{"iteration": step, "lm loss": 2.5} for step in range(1, 7)]
    measures = json.loads((tmp_path / MEASURES_FILE).read_text())
    assert measures == {"peak": {"llm": 5, "vision": 4}, "group_creation_s": 0.5}
    found = json.loads((tmp_path / TIMELINE_FILE).read_text())
    assert (found["step"], found["step_s"], found["seconds"]) == (2, 15.0, [45.0, 5.0, 15.0, 10.0, 25.0, 20.0])
    assert found["alike"] == {"0": "0", "1": "1-2"}
    lengths = {(rank, label): end_s - start_s for rank, _, start_s, end_s, label in found["spans"]}
    assert lengths == pytest.approx(
        {(0, "~data"): 3.0, (0, "vision.0F0"): 3.0, (0, "~optimizer"): 3.0}
        | {(1, "~data"): 3.0, (1, "llm.0F0"): 6.0, (1, "~optimizer"): 3.0},
        abs=1e-5,
    )


def test_a_prediction_comes_back_from_its_file_and_another_plans_is_refused(tmp_path) -> None:
    path = tmp_path / "predicted.json"
    path.write_text(format_prediction(PREDICTED))
    assert load_prediction(path, lanes_of(PLAN)) == PREDICTED
    with pytest.raises(ConfigError, match=r"another plan's lanes: generator\.0, llm\.1"):
        load_prediction(path, ["vision.0", "llm.0", "llm.1"])
    for damage in ("{", "[]", '{"step_s": 0}', format_prediction(PREDICTED).replace("8.0", "NaN")):
        path.write_text(damage)
        with pytest.raises(ConfigError, match=r"predicted\.json"):
            load_prediction(path, lanes_of(PLAN))
