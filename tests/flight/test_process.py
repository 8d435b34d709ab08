"""A rank without a launcher of ours: its line has a private place, goes with a clean end, and says who died."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.flight.directory import make_directory, name_of_job
from megatron_mosaic.flight.line import DIRECTORY_VARIABLE, line_path, read_lines
from megatron_mosaic.flight.process import TIMEOUT_VARIABLE, begin_flight, collective_timeout

JOB = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}


def test_ranks_of_a_job_agree_and_two_jobs_do_not() -> None:
    ours = name_of_job(JOB | {"RANK": "0", "LOCAL_RANK": "0"}, 7)
    assert ours == name_of_job(JOB | {"RANK": "1", "LOCAL_RANK": "1"}, 7)
    assert ours != name_of_job(JOB, 8)  # another torchrun with the same port, later
    assert ours != name_of_job(JOB | {"MASTER_PORT": "29501"}, 7)
    slurm = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "WORLD_SIZE": "2"}
    assert name_of_job(slurm, 7) == name_of_job(slurm, 8)  # every task has a parent of its own
    assert name_of_job(slurm, 7) != name_of_job(slurm | {"SLURM_STEP_ID": "1"}, 7)
    assert name_of_job({}, 7) != name_of_job({}, 8)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A temporary directory of the user's own, and no launcher."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    return tmp_path


def test_the_place_is_private_and_a_foreign_one_is_refused(elsewhere) -> None:
    made = Path(make_directory())
    assert elsewhere in made.parents
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert str(made) == make_directory()
    made.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="only this user can enter"):
        make_directory()
    made.rmdir()
    made.parent.rmdir()
    made.parent.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="only this user can enter"):
        make_directory()


def test_a_directory_that_is_given_is_taken(elsewhere, monkeypatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, "given")
    assert make_directory() == "given"


def test_seconds_win_over_minutes(monkeypatch) -> None:
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    assert collective_timeout(2).total_seconds() == 120
    monkeypatch.setenv(TIMEOUT_VARIABLE, "1.5")
    assert collective_timeout(2).total_seconds() == 1.5
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=TIMEOUT_VARIABLE):
            collective_timeout(2)


RANK = """
import os, sys, time
from megatron_mosaic.flight.process import begin_flight, end_flight, noted

@noted("step {1} lane ~save action ~save")
def save(where, step):
    print("noted", flush=True)
    if sys.stdin.readline() == "fork\\n" and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    sys.stdin.readline()

flight = begin_flight(int(os.environ["RANK"]))
assert begin_flight(int(os.environ["RANK"])) is flight
save("here", 3)
assert flight.last == "after step 3 lane ~save action ~save"
end_flight()
"""


@pytest.fixture
def ranks(elsewhere):
    """Two processes as srun would start them, each in its save."""
    environment = os.environ | {"TMPDIR": str(elsewhere), "SLURM_JOB_ID": "1", "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANK]
    started = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in (0, 1)]
    for process in started:
        assert process.stdout.readline() == "noted\n"
    yield started
    for process in started:
        process.kill()
        process.communicate()


def flight_directory(elsewhere: Path) -> Path:
    (directory,) = elsewhere.glob("mosaic-flight-*/*")
    return directory


def test_nothing_is_left_of_ranks_that_end_well(ranks, elsewhere) -> None:
    directory = flight_directory(elsewhere)
    assert {rank: line.words for rank, line in read_lines(directory).items()} == dict.fromkeys(
        (0, 1), "step 3 lane ~save action ~save"
    )
    for process in ranks:
        process.communicate("\n\n", timeout=20)
        assert process.returncode == 0
    assert not directory.exists()


def test_a_rank_that_is_told_to_end_says_whose_death_it_was(ranks, elsewhere) -> None:
    ranks[1].kill()
    ranks[0].terminate()
    _, said = ranks[0].communicate(timeout=20)
    assert ranks[0].returncode == 143
    assert said.startswith("rank 1, step 3 lane ~save action ~save\n  got:      its process is gone")
    assert line_path(flight_directory(elsewhere), 1).exists()  # for who comes later


def test_a_rank_that_is_told_to_end_while_all_live_says_nothing(ranks) -> None:
    ranks[0].terminate()
    assert ranks[0].communicate(timeout=20)[1] == ""
    assert ranks[0].returncode == 143


def test_a_child_of_a_rank_is_ended_alone(ranks) -> None:
    ranks[0].stdin.write("fork\n")
    ranks[0].stdin.flush()
    child = psutil.Process(int(ranks[0].stdout.readline()))
    child.send_signal(signal.SIGTERM)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert ranks[0].poll() is None


def test_what_an_earlier_job_of_the_same_name_left_is_gone(elsewhere, monkeypatch) -> None:
    monkeypatch.setattr("megatron_mosaic.flight.process._begun", None)
    monkeypatch.setattr("megatron_mosaic.flight.process.Farewell", lambda flight: None)
    directory = Path(make_directory())
    for name in ("rank-00003", "failed-00003", "told", "rank-00004"):
        (directory / name).write_text("old words")
    begin_flight(3)
    assert read_lines(directory)[3].words == "start-up"
    assert sorted(path.name for path in directory.iterdir()) == ["rank-00003", "rank-00004"]
    monkeypatch.delenv(DIRECTORY_VARIABLE)
