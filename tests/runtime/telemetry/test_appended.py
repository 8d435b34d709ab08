"""Files that go on over the starts of a run: against what the starts wrote, by hand."""

import json

import pytest

from megatron_mosaic.runtime.telemetry.appended import AppendedLines, read_lines


def test_lines_go_on_from_the_checkpoint_that_a_later_start_loads(tmp_path) -> None:
    """Iterations 1-3, killed in line 4; the next start loads iteration 2: its own 3 counts, no step stands twice."""
    path = tmp_path / "report" / "losses.jsonl"
    first = AppendedLines(path)
    for iteration in (1, 2, 3):
        first.append(iteration, {"loss": float(iteration)})
    with path.open("a") as file:
        file.write('{"iteration": 4, "lo')
    assert [step["iteration"] for step in read_lines(path)] == [1, 2, 3]
    second = AppendedLines(path)
    second.append(3, {"loss": 30.0})
    second.append(4, {"loss": 40.0})
    assert [(step["iteration"], step["loss"]) for step in read_lines(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]


def test_a_line_of_several_steps_replaces_what_was_trained_again(tmp_path) -> None:
    """Reports at 100 and 200, a checkpoint at 150: the next start's first report, at 251, is of steps 152-251."""
    path = tmp_path / "scalars.jsonl"
    first = AppendedLines(path)
    first.append(100, {"since": 1}, since=1)
    first.append(200, {"since": 1}, since=1)
    AppendedLines(path).append(251, {"since": 151}, since=151)
    assert [line["iteration"] for line in read_lines(path)] == [100, 251]


@pytest.mark.parametrize(("iteration", "kept"), [(1, []), (2, [1]), (9, [1, 2])])
def test_lines_of_another_format_do_not_stop_a_run(iteration, kept, tmp_path) -> None:
    path = tmp_path / "losses.jsonl"
    path.write_text('{"iteration": 1}\n{"lm loss": 2.5}\n{"iteration": 2}\n')
    AppendedLines(path).append(iteration, {"loss": 1.0})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [*kept, iteration]


def test_a_start_that_is_killed_while_it_takes_lines_back_loses_none(tmp_path, monkeypatch) -> None:
    path = tmp_path / "losses.jsonl"
    AppendedLines(path).append(1, {"loss": 1.0})
    before = path.read_text()

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        AppendedLines(path).append(2, {"loss": 2.0})
    assert path.read_text() == before
    monkeypatch.undo()
    AppendedLines(path).append(2, {"loss": 2.0})
    assert [line["iteration"] for line in read_lines(path)] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]
