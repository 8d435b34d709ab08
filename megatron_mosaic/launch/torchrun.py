"""`run_torchrun` starts torchrun as a user would call it (training); as a script, this file is that torchrun.

Every rank gets a flight file, so that even a killed rank's lane and action can be named.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from megatron_mosaic.colocation.flight import DIRECTORY_VARIABLE
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.failures import die_with_parent, first_cause, rank_failure

_MESSAGE_LINES = 4  # of a MosaicError
_REJECTED = 2  # exit status of argparse, and of our scripts for wrong input
_LOGS = "worker-logs"
_CAUSE_FILE = "first-failure.json"


def run_torchrun(
    world_size: int,
    arguments: Sequence[str],
    *,
    output: IO[str] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run `python ARGUMENTS` under torchrun on this machine; `watch` is called about twice a second.

    `output` takes what the workers print (default: our own stdout). ConfigError if the first worker that failed
    rejected its arguments (exit status 2), RankFailure if it failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="mosaic-") as directory:
        command = [sys.executable, "-m", "megatron_mosaic.launch.torchrun", "--standalone"]
        # Everything is shown and kept, without a prefix: the template is the role, and the role is empty.
        command += ["--tee", "3", "--log-dir", str(Path(directory) / _LOGS), "--role", ""]
        command += ["--nproc-per-node", str(world_size), *arguments]
        env = os.environ | {DIRECTORY_VARIABLE: directory, "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}"}
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("PYTHONUNBUFFERED", "1")  # lines appear when they are printed, and survive a crash
        job = subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
        try:
            while job.poll() is None:
                time.sleep(0.5)
                watch()
        finally:
            if job.poll() is None:  # we are leaving early: torchrun stops its workers
                job.terminate()
                job.wait()
        if job.returncode:
            cause = Path(directory) / _CAUSE_FILE
            rank, code = json.loads(cause.read_text()) if cause.exists() else (0, None)
            if code == _REJECTED:
                raise ConfigError(
                    "arguments of the workers",
                    got=_last_message(directory, rank),
                    expected="arguments that the script and Megatron accept",
                    fix="correct them; the whole message stands above",
                )
            if code is None:
                got = f"exit code {job.returncode} of torchrun"
            else:
                got = f"killed by {signal.Signals(-code).name}" if code < 0 else "failed"
            raise rank_failure(rank, got, directory, all_ranks=True)


def torchrun(arguments: Sequence[str]) -> int:
    """torchrun itself; leaves behind which rank failed first, and its exit status, beside the flight files."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        directory = os.environ[DIRECTORY_VARIABLE]
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = first_cause(codes, directory)
        (Path(directory) / _CAUSE_FILE).write_text(json.dumps([rank, codes[rank]]))
        if codes[rank] != _REJECTED:
            print(error, file=sys.stderr)
        return 1
    return 0


def _last_message(directory: str, rank: int) -> str:
    """What the rank said last on stderr: the message after argparse's `error:`, or its last lines."""
    logs = sorted(Path(directory).glob(f"{_LOGS}/*/attempt_0/{rank}/stderr.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if ": error: " in line:
            return line.partition(": error: ")[2]
    return "\n".join(lines[-_MESSAGE_LINES:]) or f"exit status {_REJECTED}"


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
