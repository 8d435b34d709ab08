"""Flight files: the last line of a rank, even of one that was killed."""

import os
import signal

from megatron_mosaic.flight.line import DIRECTORY_VARIABLE, WORDS_BYTES, Flight, read_lines


def words(directory) -> dict[int, str]:
    return {rank: line.words for rank, line in read_lines(directory).items()}


def test_every_rank_has_its_own_last_line(tmp_path) -> None:
    flights = [Flight(rank, str(tmp_path)) for rank in (0, 3, 11)]
    assert words(tmp_path) == {0: "start-up", 3: "start-up", 11: "start-up"}
    flights[1].note("step 1 lane llm.0 action llm.0F0, a long line")
    flights[1].note("short")
    assert words(tmp_path) == {0: "start-up", 3: "short", 11: "start-up"}


def test_a_line_that_is_too_long_is_cut(tmp_path) -> None:
    Flight(0, str(tmp_path)).note("x" * 1000)
    assert words(tmp_path) == {0: "x" * WORDS_BYTES}


def test_the_environment_names_the_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    Flight(7).note("here")
    assert words(tmp_path) == {7: "here"}


def test_without_a_directory_only_the_object_remembers(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    flight = Flight(0)
    flight.note("here")
    assert flight.last == "here" and words(tmp_path) == {}


def test_the_line_survives_a_killed_process(tmp_path) -> None:
    child = os.fork()
    if child == 0:
        Flight(5, str(tmp_path)).note("step 9 lane llm.1 action llm.1B3")
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert words(tmp_path) == {5: "step 9 lane llm.1 action llm.1B3"}
