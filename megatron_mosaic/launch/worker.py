"""What torchrun or srun starts for every rank of ours: the script, in a process that dies with torchrun, with a flight.

Before the script's own imports, which take seconds. Called as python is: `-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS`.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.parent import die_with_parent
from megatron_mosaic.flight.process import begin_flight
from megatron_mosaic.flight.verdict import judge, name_files, stamp
from megatron_mosaic.launch.slurm.cause import note_cause
from megatron_mosaic.launch.slurm.ending import EXITS_VARIABLE, note_exit
from megatron_mosaic.launch.slurm.environment import take_rank_from_slurm

PARENT_VARIABLE = "MOSAIC_TORCHRUN_PID"


def main(words: Sequence[str]) -> Never:
    """Run the script and leave with its exit status, by the shortest way: a peer may be gone, its sockets half open."""
    if PARENT_VARIABLE in os.environ:  # torchrun's that we started; srun's tasks have none
        die_with_parent(int(os.environ[PARENT_VARIABLE]))
    take_rank_from_slurm()
    rank = int(os.environ["RANK"])
    flight = begin_flight(rank)
    code = 0
    try:
        _run(list(words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        if code:
            stamp(flight, at_ns=time.monotonic_ns(), follows=False)
    except BaseException as error:
        code = 1
        judge(flight, error)  # before peers can notice
        traceback.print_exc()
    if code and flight.stays_at:
        print(f"mosaic: rank {rank}: {name_files(flight)}", file=sys.stderr)
    try:
        _leave_word(rank, code, flight)
    except Exception:
        traceback.print_exc()
    finally:  # whatever could not be said: peers wait for a rank that stays
        _flush_and_exit(code)


def _leave_word(rank: int, code: int, flight: Flight) -> None:
    """Exit status and cause, for the job's batch program, where there is one."""
    if EXITS_VARIABLE in os.environ:
        note_exit(os.environ[EXITS_VARIABLE], rank, code)
        if code:
            note_cause(os.environ[EXITS_VARIABLE], flight)


def _flush_and_exit(code: int) -> Never:
    """Also with a full disk behind stdout."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
