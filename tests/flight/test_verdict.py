"""Whose failure it is, as a rank sees it that fails: its own, or of the rank it waited for."""

import platform
import subprocess
import sys
import time

import pytest

from megatron_mosaic.errors import ConfigError, RankFailure
from megatron_mosaic.flight.line import Flight, line_path, read_lines
from megatron_mosaic.flight.suspects import GONE, Suspect, read_states
from megatron_mosaic.flight.verdict import failure_of, is_follower, judge, naming, read_verdicts, stamp

# As torch 2.13 says it.
TIMED_OUT = RuntimeError(
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv "
    "operation to complete"
)
CLOSED = RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:14254.")


class DistStoreError(RuntimeError):
    """By name torch's."""


def caused_by(error: Exception) -> Exception:
    try:
        raise ValueError("could not save") from error
    except ValueError as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (TIMED_OUT, True),
        (CLOSED, True),
        (DistStoreError("wait timeout after 3000ms, keys: /default_pg/0//x"), True),
        (ConnectionResetError("by peer"), True),
        (caused_by(CLOSED), True),
        (ValueError("a bad sample"), False),
        (TimeoutError("reading the dataset timed out"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_says_that_somebody_else_is_at_fault(error, follows) -> None:
    assert is_follower(error) is follows


@pytest.fixture
def world(tmp_path):
    """Two ranks: 0 is this process, 1 a child that does nothing but beat."""
    code = """
import sys, time
from megatron_mosaic.flight.heart import Heart
from megatron_mosaic.flight.line import Flight

Flight(1, sys.argv[1]).note("step 3 lane llm.0 action llm.0F3")
Heart(1, sys.argv[1])
print(flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    child.stdout.readline()
    yield Flight(0, str(tmp_path)), child
    child.kill()
    child.wait()


def test_a_rank_that_waited_its_time_names_the_one_that_runs(world) -> None:
    flight, _ = world
    while not read_lines(flight.directory)[1].pulse.place:  # its second beat
        time.sleep(0.05)
    verdict = judge(flight, TIMED_OUT)
    assert (verdict.suspect, verdict.words) == (1, "step 3 lane llm.0 action llm.0F3")
    assert verdict.why.startswith("it does not wait, it runs at <module> (<string>:9), for ")
    assert "rank 1: step 3 lane llm.0 action llm.0F3; runs" in verdict.report


def test_a_closed_connection_is_nobodys_fault_as_long_as_all_live(world) -> None:
    flight, _ = world
    assert judge(flight, CLOSED).suspect is None


def test_a_closed_connection_names_the_rank_that_died(world) -> None:
    flight, child = world
    child.kill()
    failure = failure_of(flight, "step 3 lane llm.0 action llm.0B1", CLOSED)
    assert failure.where == "rank 1, step 3 lane llm.0 action llm.0F3"
    assert failure.got.startswith("its process is gone")
    assert "rank 0, step 3 lane llm.0 action llm.0B1" in failure.got


def test_an_error_of_its_own_is_its_own(world) -> None:
    flight, child = world
    child.kill()
    failure = failure_of(flight, "step 3 lane llm.0 action llm.0B1", ValueError("a bad sample"))
    assert failure.where == "rank 0, step 3 lane llm.0 action llm.0B1"
    assert failure.got == "ValueError: a bad sample"


def test_whoever_failed_first_is_named_by_all_that_follow(tmp_path) -> None:
    flights = [Flight(rank, str(tmp_path)) for rank in range(3)]
    flights[2].note("step 1 lane ~data action ~data")
    judge(flights[2], ValueError("a bad sample"))
    time.sleep(0.001)
    assert [judge(flights[rank], CLOSED).cause for rank in (1, 0)] == [2, 2]
    assert [verdict.rank for verdict in read_verdicts(tmp_path)] == [2, 1, 0]


def test_a_follower_that_is_gone_before_it_is_looked_at_is_not_the_cause(world, monkeypatch) -> None:
    """Rank 1 follows rank 2, says so and ends, all between two looks of rank 0, which failed a moment earlier."""
    flight, child = world
    Flight(2, flight.directory).note("step 4 lane llm.0 action llm.0F1")

    def read_late(directory, asking):
        monkeypatch.undo()
        stamp(Flight(1, directory), at_ns=2, follows=True, suspect=Suspect(rank=2, why=GONE))
        child.kill()
        child.wait()
        return read_states(directory, asking)

    monkeypatch.setattr("megatron_mosaic.flight.verdict.read_states", read_late)
    assert judge(flight, CLOSED).cause == 2


def test_a_follower_without_a_suspect_is_nobodys_cause(world) -> None:
    flight, child = world
    stamp(Flight(1, flight.directory), at_ns=time.monotonic_ns(), follows=True)
    child.kill()
    child.wait()
    assert judge(flight, CLOSED).suspect is None


def test_the_first_verdict_of_a_rank_stays(tmp_path) -> None:
    flight = Flight(0, str(tmp_path))
    first = judge(flight, ValueError("a"))
    assert judge(flight, KeyError("b")) == first
    (tmp_path / "failed-00001").write_text('{"rank": 1')  # is being written
    assert read_verdicts(tmp_path) == [first]


def test_without_a_directory_a_failure_is_named_all_the_same(monkeypatch) -> None:
    monkeypatch.delenv("MOSAIC_FLIGHT_DIR", raising=False)
    flight = Flight(4)
    flight.note("set-up: model")
    with pytest.raises(RankFailure, match="rank 4, set-up: model"), naming(flight):
        raise OSError("full")
    with pytest.raises(ConfigError), naming(flight):
        raise ConfigError("x", got="y", expected="z", fix="w")


def test_a_failure_says_where_its_flight_files_stay(tmp_path) -> None:
    """Under srun or torchrun alone; a launcher of ours reads them, and removes them."""
    where = f"{platform.node()}:{tmp_path}"
    assert failure_of(Flight(0, str(tmp_path), stays=True), "here", ValueError("a")).got.endswith(where)
    assert where not in failure_of(Flight(1, str(tmp_path)), "here", ValueError("a")).got


def test_a_verdict_that_cannot_be_written_does_not_hide_the_failure(tmp_path, capsys) -> None:
    flight = Flight(0, str(tmp_path))
    line_path(tmp_path, 0).unlink()
    tmp_path.rmdir()
    assert failure_of(flight, "here", ValueError("the cause")).got == "ValueError: the cause"
    assert "failed-00000" in capsys.readouterr().err
