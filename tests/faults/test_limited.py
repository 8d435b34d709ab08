"""The runner of the campaign notices what it is for: a crash, a loop, a flood of memory; and what a command printed."""

import signal

from tests.faults.limited import CRASHED, run_limited


def fail() -> None:
    raise ZeroDivisionError("on purpose")


def loop() -> None:
    while True:
        pass


def test_a_refusal_is_seen_with_its_words(tmp_path):
    outcome = run_limited(["show", tmp_path / "none.yaml"], tmp_path)
    assert (outcome.status, outcome.out) == (2, "")
    assert "no such file" in outcome.err
    assert 0 < outcome.cpu_s < 5


def test_a_crash_a_loop_and_a_flood_are_seen(tmp_path):
    crashed = run_limited([], tmp_path, before=fail)
    assert (crashed.status, crashed.err.splitlines()[-1]) == (CRASHED, "ZeroDivisionError: on purpose")
    assert run_limited([], tmp_path, before=loop, cpu_limit_s=1).status == -signal.SIGXCPU
    flooded = run_limited([], tmp_path, before=lambda: bytearray(2 * 10**9))
    assert (flooded.status, flooded.err.splitlines()[-1]) == (CRASHED, "MemoryError")
    assert run_limited(["show", "none.yaml"], tmp_path, before=lambda: b"x" * (3 * 10**8)).memory_bytes > 10**8
