"""Forked ranks: what they see, who is blamed when one fails, and that none is left behind."""

import gc
import os
import re
import signal
import sys
import time

import psutil
import pytest
import torch.distributed as dist

from megatron_mosaic.errors import ConfigError, RankFailure
from megatron_mosaic.flight.line import Flight
from megatron_mosaic.launch.forked import run_forked
from megatron_mosaic.launch.torchrun import run_torchrun

pytestmark = pytest.mark.dist


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before, f"processes left behind: {after - before}"


def rank() -> int:
    return int(os.environ["RANK"])


def write_environment(directory) -> None:
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "EXTRA")
    (directory / str(rank())).write_text(" ".join(os.environ[key] for key in keys))


class Ring:
    """A process group in a reference cycle: only the garbage collector destroys it, and that joins its threads."""

    def __init__(self) -> None:
        self.group, self.ring = dist.group.WORLD, self


def test_a_rank_does_not_destroy_what_it_inherited() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    held = [Ring()]
    dist.destroy_process_group()

    def drop_and_collect() -> None:
        held.clear()
        gc.collect()

    run_forked(1, drop_and_collect, timeout_s=20.0)


def test_every_rank_sees_torchruns_variables(tmp_path) -> None:
    before = dict(os.environ)
    run_forked(3, write_environment, tmp_path, env={"EXTRA": "more"})
    for number in range(3):
        assert (tmp_path / str(number)).read_text() == f"{number} {number} 3 3 127.0.0.1 more"
    assert dict(os.environ) == before


def raise_on_rank_1() -> None:
    flight = Flight(rank())
    if rank() == 1:
        flight.note("step 2 lane llm.0 action llm.0F3")
        print("a line of output")
        raise ValueError("a message of the failure")
    time.sleep(300)


def test_a_raising_rank_is_named_with_its_action_and_traceback() -> None:
    with pytest.raises(RankFailure) as failure:
        run_forked(3, raise_on_rank_1)
    assert failure.value.where == "rank 1, step 2 lane llm.0 action llm.0F3"
    assert failure.value.got.startswith("exit code 1\n")
    assert "a line of output" in failure.value.got
    assert "ValueError: a message of the failure" in failure.value.got


def follow_rank_2(directory, fail) -> None:
    """Rank 2 fails; ranks 0 and 1 fail because it is gone, at once, as peers of a closed connection do."""
    mark = directory / "pid"
    if rank() == 2:
        mark.write_text(str(os.getpid()))
        fail()
    while not mark.exists() or is_running(int(mark.read_text() or os.getpid())):
        pass
    raise ConnectionError("a follower")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fail_by_raising() -> None:
    raise ValueError("the cause")


def fail_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_rank_that_failed_first_is_named(tmp_path) -> None:
    with pytest.raises(RankFailure, match="the cause") as failure:
        run_forked(3, follow_rank_2, tmp_path, fail_by_raising)
    assert failure.value.where.startswith("rank 2,")


def kill_rank_1() -> None:
    flight = Flight(rank())
    if rank() == 1:
        flight.note("step 7 lane vision.0 action vision.0B1")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def test_a_killed_rank_is_named_with_its_action() -> None:
    with pytest.raises(RankFailure) as failure:
        run_forked(3, kill_rank_1)
    assert failure.value.where == "rank 1, step 7 lane vision.0 action vision.0B1"
    assert failure.value.got.startswith("killed by SIGKILL\n")


def test_a_killed_rank_is_the_cause_not_its_followers(tmp_path) -> None:
    with pytest.raises(RankFailure, match=re.escape("rank 2, start-up")):
        run_forked(3, follow_rank_2, tmp_path, fail_by_signal)


def hang_on_rank_0() -> None:
    flight = Flight(rank())
    if rank() == 0:
        flight.note("step 1 lane llm.0 action llm.0F0")
        time.sleep(300)


def test_a_hanging_rank_is_named_after_the_timeout() -> None:
    with pytest.raises(RankFailure, match=r"rank 0, step 1 lane llm\.0 action llm\.0F0\n.*still running after 1 s"):
        run_forked(2, hang_on_rank_0, timeout_s=1.0)


@pytest.mark.parametrize(("code", "expected"), [(3, "exit code 3"), ("text", "exit code 1")])
def test_exit_statuses_count_as_failures(code, expected) -> None:
    with pytest.raises(RankFailure, match=expected):
        run_forked(1, sys.exit, code)
    with pytest.raises(RankFailure, match="exit code 2"):
        run_forked(1, lambda: 2)


WORKER = """
import importlib.util, pathlib, sys
from megatron_mosaic.flight.line import Flight

spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
flight = Flight(cases.rank())
flight.note("step 4 lane llm.0 action llm.0F1")
cases.follow_rank_2(pathlib.Path(sys.argv[2]), getattr(cases, sys.argv[3]))
"""


@pytest.mark.parametrize("fail", [fail_by_signal, fail_by_raising])
def test_torchrun_names_the_first_rank_not_its_followers(tmp_path, fail) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    with (tmp_path / "log").open("w") as log, pytest.raises(RankFailure) as failure:
        run_torchrun(3, [str(tmp_path / "worker.py"), __file__, str(tmp_path), fail.__name__], output=log)
    assert failure.value.where == "rank 2, step 4 lane llm.0 action llm.0F1"


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("import argparse; argparse.ArgumentParser().parse_args(['--no-such-flag'])", "arguments: --no-such-flag"),
        (
            "sys.exit(print('where\\n  got:      x\\n  expected: y\\n  fix:      z', file=sys.stderr) or 2)",
            "where\n  got:",
        ),
    ],
)
def test_a_worker_that_rejects_its_arguments_is_wrong_input_with_its_message(tmp_path, code, got) -> None:
    (tmp_path / "worker.py").write_text(f"import sys\nprint('a line of output')\n{code}\n")
    with (tmp_path / "log").open("w") as log, pytest.raises(ConfigError) as failure:
        run_torchrun(2, [str(tmp_path / "worker.py")], output=log)
    assert got in failure.value.got
    shown = (tmp_path / "log").read_text()
    assert "\na line of output\n" in "\n" + shown  # whole lines, no prefix
    assert "Traceback" not in shown


def test_a_forked_rank_does_not_inherit_the_handler_of_its_parent() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(RankFailure, match="killed by SIGTERM"):
            run_forked(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
