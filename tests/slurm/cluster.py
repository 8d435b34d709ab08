"""A test's view of a Slurm and of the run directories of jobs."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Slurm:
    """The cluster's commands, as a user has them. `environment`: of everything that runs there."""

    environment: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.run("scontrol", "show", "job", job).split("JobState=")[1].split()[0]

    def wait(self, what: str, is_there: Callable[[], object], *, timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_there():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
            time.sleep(0.2)

    def wait_for_end(self, job: str, run: Path) -> str:
        """The state that the job ends in."""
        running = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        self.wait(f"end of {run}", lambda: self.state(job) not in running)
        return self.state(job)


def log_of(run: Path) -> str:
    """The end of the job's log."""
    return "".join(path.read_text(errors="replace")[-4000:] for path in run.glob("slurm-*.log"))


def history(run: Path) -> list[dict]:
    """What became of each start."""
    path = run / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[tuple[int, float]]:
    """(iteration, loss) of every step so far."""
    path = run / "report" / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(step["iteration"], step["loss"]) for step in steps]
