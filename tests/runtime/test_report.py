"""The plain parts of a report in one process."""

import json

import pytest
import torch.distributed as dist

from megatron_mosaic.runtime.activation_meter import ActivationMeter
from megatron_mosaic.runtime.report import (
    LOSSES_FILE,
    MEASURES_FILE,
    TIMELINE_FILE,
    Observers,
    StepReport,
    UnitStatistics,
)
from megatron_mosaic.schedules.timeline import Span


@pytest.fixture
def two_ranks(monkeypatch):
    """`gather(others)`: what the other ranks contribute when rank 0 gathers."""
    others = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1 + len(others))

    def gather(into, own, group):
        into[:] = [own, *others]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    return others


def test_report_of_the_median_step(tmp_path, two_ranks) -> None:
    """Four steps of 9, 3, 1 and 2 s: the first is warm-up, the median of the rest is the last (2 s)."""
    two_ranks.append(([[], [], [], [Span(1, "llm.0", 30.5, 32.0, "llm.0F0")]], {"peak": {"llm": 5}}, 0.5))
    report = StepReport(str(tmp_path), rank=0)
    for start_s, length_s in ((0.0, 9.0), (10.0, 3.0), (20.0, 1.0), (30.0, 2.0)):
        report.add_spans([Span(0, "vision.0", start_s, start_s + length_s, "vision.0F0")])
    report.add_losses(3, {"lm loss": 2.5})
    report.write(None, {"peak": {"llm": 3, "vision": 4}}, 0.25)

    lines = (tmp_path / LOSSES_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"iteration": 3, "lm loss": 2.5}]
    assert json.loads((tmp_path / MEASURES_FILE).read_text()) == {
        "peak": {"llm": 5, "vision": 4},
        "group_creation_s": 0.5,
    }
    timeline = json.loads((tmp_path / TIMELINE_FILE).read_text())
    assert (timeline["step"], timeline["step_s"], timeline["seconds"]) == (3, 2.0, [9.0, 3.0, 1.0, 2.0])
    assert timeline["spans"] == [[0, "vision.0", 0.0, 2.0, "vision.0F0"], [1, "llm.0", 0.5, 2.0, "llm.0F0"]]


def test_losses_go_on_from_the_checkpoint_that_a_later_start_loads(tmp_path) -> None:
    """Iterations 1-3, killed in line 4; the next start loads iteration 2: its own 3 counts, no step stands twice."""
    first = StepReport(str(tmp_path), rank=0)
    for iteration in (1, 2, 3):
        first.add_losses(iteration, {"loss": float(iteration)})
    with (tmp_path / LOSSES_FILE).open("a") as file:
        file.write('{"iteration": 4, "lo')
    second = StepReport(str(tmp_path), rank=0)
    second.add_losses(3, {"loss": 30.0})
    second.add_losses(4, {"loss": 40.0})
    lines = (tmp_path / LOSSES_FILE).read_text().splitlines()
    found = [(step["iteration"], step["loss"]) for step in map(json.loads, lines)]
    assert found == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


@pytest.mark.parametrize(("iteration", "kept"), [(1, []), (2, [1]), (9, [1, 2])])
def test_losses_of_another_format_do_not_stop_a_run(iteration, kept, tmp_path) -> None:
    path = tmp_path / LOSSES_FILE
    path.write_text('{"iteration": 1}\n{"lm loss": 2.5}\n{"iteration": 2}\n')
    StepReport(str(tmp_path), rank=0).add_losses(iteration, {"loss": 1.0})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [*kept, iteration]


def test_only_rank_0_writes_losses(tmp_path) -> None:
    StepReport(str(tmp_path), rank=1).add_losses(1, {"lm loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_unit_statistics_by_hand() -> None:
    """Of three vision units one was empty; owners would have had 2 and 1 times the mean on the busiest slot."""
    units = UnitStatistics(("vision", "llm"))
    units.note("vision", num_empty=0, imbalance=(2.0, 1.5))
    units.note("vision", num_empty=0, imbalance=(1.0, 1.0))
    units.note("vision", num_empty=1, imbalance=(1.5, 1.25))
    assert units.measures() == {
        "empty_units_by_module": {"vision": 1, "llm": 0},
        "imbalance_by_owner": {"vision": 1.5},
        "imbalance_by_module": {"vision": 1.25},
    }


def test_nobody_looks_on_without_observers() -> None:
    nobody, meter = Observers(), ActivationMeter()
    with nobody.forward("llm", 0):
        pass
    nobody.backward("llm", 0)
    nobody.losses(1, {"lm loss": 1.0})
    nobody.finished_gradients(None, None)
    nobody.finished_step(lambda: pytest.fail("asked for spans that nobody keeps"))
    nobody.finished_training(None)
    assert nobody.measures(["llm"]) == {"peak_activation_bytes_by_module": {"llm": 0}}
    somebody = Observers(meter=meter)
    with somebody.forward("llm", 0):
        pass
    somebody.backward("llm", 0)
    assert meter.peak_bytes == {"llm": 0}
