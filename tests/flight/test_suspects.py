"""Who is to blame, from lines alone: made-up states of ranks, each with the one that must be named."""

import os
import platform

from megatron_mosaic.flight.line import Flight, Line, Pulse
from megatron_mosaic.flight.suspects import (
    FINISHED,
    GONE,
    SILENT_S,
    State,
    find_gone,
    find_suspect,
    process_exists,
    read_states,
    render_states,
)


def state(rank: int, *, exists=True, silent_s=0.0, words="step 1 lane llm.0 action llm.0F0", **pulse) -> State:
    beat = Pulse(host=platform.node(), pid=0, born_ns=0, beat_ns=0, **pulse)
    return State(line=Line(rank=rank, words=words, pulse=beat), exists=exists, silent_s=silent_s)


def waiting(rank: int, *peers: int, **more) -> State:
    return state(rank, waits_in="recv", peers=peers, still_s=9.0, **more)


def blamed(*states: State, **more) -> int | None:
    suspect = find_suspect({s.line.rank: s for s in states}, **more)
    return suspect and suspect.rank


def test_a_dead_rank_before_a_silent_one_before_one_that_runs() -> None:
    dead, silent, awake = state(2, exists=False), state(3, silent_s=SILENT_S), state(1, still_s=9.0)
    assert blamed(waiting(0, 1), awake, dead, silent) == 2
    assert blamed(waiting(0, 1), awake, silent) == 3
    assert blamed(waiting(0, 1), awake) == 1


def test_a_silent_rank_is_to_blame_even_if_its_last_word_was_that_it_waits() -> None:
    assert blamed(waiting(0, 1), waiting(1, 0, silent_s=8.0)) == 1


def test_a_beat_that_is_a_little_late_is_no_silence() -> None:
    assert blamed(waiting(0, 1), waiting(1, 0, silent_s=2.0)) is None


def test_who_has_done_its_work_may_be_gone() -> None:
    states = {0: waiting(0, 1), 1: state(1, exists=False, words=FINISHED)}
    assert find_gone(states) is None
    assert find_gone({1: state(1, exists=False)}).why == GONE


def test_of_those_that_run_the_one_that_is_waited_for() -> None:
    long, wanted = state(1, still_s=30.0), state(2, still_s=1.0)
    assert blamed(waiting(0, 2), long, wanted) == 2
    assert blamed(waiting(0, 1, 2), long, wanted) == 1  # a group names nobody: who has stood still longest


def test_a_rank_without_a_line_is_missed_where_it_is_expected() -> None:
    assert blamed(waiting(0, 1), waiting(1, 2), expected=range(3)) == 2
    assert blamed(waiting(0, 1), waiting(1, 2)) is None


def test_the_rank_that_asks_does_not_blame_itself() -> None:
    assert blamed(state(0, still_s=5.0), waiting(1, 0), besides=0) is None


def test_what_the_report_says_of_each() -> None:
    states = {
        0: waiting(0, 2, place="take (incoming.py:84)"),
        1: state(1, waits_in="all_reduce", peers=(0, 2), place="_reduce (mappings.py:35)"),
        2: state(2, silent_s=8.0),
        3: state(3, still_s=3.0, place="read (data.py:7)"),
        4: state(4, exists=False),
    }
    words = "step 1 lane llm.0 action llm.0F0"
    assert render_states(states).splitlines() == [
        f"  rank 0: {words}; waits in recv for rank 2 at take (incoming.py:84), for 9 s",
        f"  rank 1: {words}; waits in all_reduce for ranks 0, 2 at _reduce (mappings.py:35)",
        f"  rank 2: {words}; no sign of life for 8 s",
        f"  rank 3: {words}; runs at read (data.py:7), for 3 s",
        f"  rank 4: {words}; its process is gone",
    ]
    assert render_states(dict.fromkeys(range(100), states[4])).endswith("  and 36 more")


def test_a_child_that_has_ended_and_is_not_waited_for_does_not_exist() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not process_exists(child)
    os.waitpid(child, 0)
    assert not process_exists(child)
    assert process_exists(os.getpid())


def test_lines_of_an_earlier_job_and_of_another_host_are_not_seen_by_a_rank_that_asks(tmp_path) -> None:
    def write(rank: int, host: str, born_s: int, beat_s: int) -> None:
        flight = Flight(rank, str(tmp_path))
        pulse = Pulse(host=host, pid=os.getpid(), born_ns=born_s * 10**9, beat_ns=beat_s * 10**9)
        (tmp_path / f"rank-{rank:05d}").write_bytes(b" " * 256 + pulse.as_bytes())
        assert flight.last == "start-up"

    here = platform.node()
    write(0, here, 100, 110)
    write(1, here, 10, 90)
    write(2, f"not {here}", 100, 110)
    write(3, here, 99, 99)
    assert set(read_states(tmp_path, asking=0)) == {0, 3}
    assert set(read_states(tmp_path)) == {0, 1, 3}
