"""The program of a batch script: starts the ranks, and has the job requeued where a signal ended them before time.

    Slurm --USR1, TERM or USR2, some time before the limit--> batch --TERM--> ranks: save after their step, and end
      ranks ended --> ending.decide --> requeue: Slurm starts the script again, perhaps on fewer nodes
      nodes are not what the plan is for --> `mosaic plan` for those that are there --> training goes on

`python -m megatron_mosaic.launch.slurm.batch RUN_DIR`, in place of the batch shell, whose signals it takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mosaic.errors import MosaicError
from megatron_mosaic.launch.slurm.cause import read_cause
from megatron_mosaic.launch.slurm.ending import EXITS_VARIABLE, Attempt, Ending, decide, exit_status, read_exits
from megatron_mosaic.launch.slurm.environment import meeting_port
from megatron_mosaic.launch.slurm.hosts import expand_hosts, find_address
from megatron_mosaic.launch.slurm.job import Form, Job, add_history, load_job, plan_file, prediction_file
from megatron_mosaic.plan.plan_file import load_plan

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_REQUEUE_S = 60.0  # until Slurm ends a job that it has agreed to start again


class Batch:
    """One start of a job. `_told_at`: when Slurm's signal came (monotonic seconds; infinite while it has not)."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory, self._job = directory, load_job(directory)
        self._job_id = environment["SLURM_JOB_ID"]
        self._restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self._hosts = expand_hosts(environment["SLURM_JOB_NODELIST"])
        self._told_at = float("inf")
        self._exits = directory / "exits" / f"{self._job_id}-{self._restarts}"
        self._environment = dict(environment)
        for number in SIGNALS:
            signal.signal(number, self._tell)

    def run(self) -> int:
        """Plan if need be, train, decide; the exit status of the job, unless it is requeued."""
        path = self._plan()
        world_size, before = load_plan(path).world_size, self._job.saved_steps
        self._say(f"{len(self._hosts)} nodes, {world_size} ranks, {path.name}, from step {before}")
        status = self._train(path, world_size)
        attempt = Attempt(
            status=status,
            exits=read_exits(self._exits),
            was_told=self._was_told,
            is_cancelled=self._is_cancelled(),
            saved_steps=self._job.saved_steps,
            num_steps=self._job.num_steps,
            restarts=self._restarts,
            max_restarts=self._job.max_restarts,
        )
        ending = decide(attempt)
        self._say(f"{ending} at step {attempt.saved_steps}; srun's status {status}, ranks' {attempt.exits or 'none'}")
        found = {"job_id": self._job_id, "restart": self._restarts, "nodes": len(self._hosts), "ranks": world_size}
        found |= {"plan": path.name, "from_step": before, "to_step": attempt.saved_steps, "ending": str(ending)}
        cause = read_cause(self._exits)
        if cause:
            self._say(f"first failure: {cause}")
            found["cause"] = cause
        add_history(self._directory, found)
        return self._requeue() if ending is Ending.requeue else exit_status(ending, attempt)

    def _plan(self) -> Path:
        """The plan for the nodes that are there; made if nobody has made it."""
        path = self._directory / plan_file(len(self._hosts), self._job)
        if not path.exists():
            draft = path.with_suffix(".part")
            words = [*self._job.plan_words, self._job.size_word(len(self._hosts)), "--out", str(draft)]
            words += ["--predicted", str(prediction_file(path))] if self._job.is_predicted else []
            self._say(f"mosaic plan {' '.join(words)}")
            subprocess.run([sys.executable, "-m", "megatron_mosaic.cli", "plan", *words], check=True)
            draft.rename(path)
        return path

    def _train(self, plan: Path, world_size: int) -> int:
        """srun's exit status."""
        if self._was_told:  # while it planned
            return 128 + signal.SIGTERM
        self._exits.mkdir(parents=True, exist_ok=True)
        per_node = self._job.ranks_per_node
        hosts = self._hosts[: -(-world_size // per_node)]
        env = self._environment | {EXITS_VARIABLE: str(self._exits), "PYTHONUNBUFFERED": "1"}
        env |= {"MASTER_ADDR": find_address(hosts[0]), "MASTER_PORT": str(meeting_port(self._environment))}
        if self._job.form is Form.srun:  # rank r on node r // per_node, also where the last node has fewer
            order = self._exits / "hosts"
            order.write_text("".join(f"{hosts[rank // per_node]}\n" for rank in range(world_size)))
            env["SLURM_HOSTFILE"] = str(order)
        for key in ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):  # of the job: they contradict the step's
            env.pop(key, None)
        command = srun_command(self._job, world_size, len(hosts), str(plan), self._environment)
        step = subprocess.Popen(command, env=env, start_new_session=True)
        while step.poll() is None:
            time.sleep(0.2)
            if time.monotonic() > self._told_at + self._job.grace_s:
                self._say(f"the ranks did not end within {self._job.grace_s} s")
                step.terminate()
                step.wait()
        return step.returncode if step.returncode >= 0 else 128 - step.returncode

    @property
    def _was_told(self) -> bool:
        return self._told_at < float("inf")

    def _tell(self, number: int, _: object) -> None:
        """Let the ranks save. What comes later is the same request, or Slurm ending the job."""
        if not self._was_told:
            self._told_at = time.monotonic()
            self._say(f"{signal.Signals(number).name}: the ranks save and end")
            subprocess.Popen(["scancel", "--quiet", "--signal=TERM", self._job_id], stdin=subprocess.DEVNULL)

    def _is_cancelled(self) -> bool:
        """Whether Slurm ends the job for good: then it is no longer running."""
        if not self._was_told:
            return False
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", self._job_id, "--format=%T"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() not in ("RUNNING", "")

    def _requeue(self) -> int:
        """Slurm ends this process when it starts the job anew."""
        asked = subprocess.run(["scontrol", "requeue", self._job_id], check=False)
        if asked.returncode:
            return asked.returncode
        time.sleep(_REQUEUE_S)
        return 0

    def _say(self, text: str) -> None:
        os.write(1, f"mosaic: job {self._job_id}, restart {self._restarts}: {text}\n".encode())  # handlers say, too


def srun_command(job: Job, world_size: int, num_nodes: int, plan: str, environment: Mapping[str, str]) -> list[str]:
    """The job step that runs the ranks, as a list of words: nothing of it meets a shell."""
    words = [*job.script, *job.arguments, "--mosaic-plan", plan]
    words += ["--mosaic-predicted", str(prediction_file(Path(plan)))] if job.is_predicted else []
    command = ["srun", "--kill-on-bad-exit=1", f"--nodes={num_nodes}"]
    if "SLURM_CPUS_PER_TASK" in environment:  # srun takes it over from the job no longer
        command.append(f"--cpus-per-task={environment['SLURM_CPUS_PER_TASK']}")
    if job.form is Form.srun:
        command += [f"--ntasks={world_size}", "--distribution=arbitrary"]
        return [*command, sys.executable, "-m", "megatron_mosaic.launch.worker", *words]
    command += [f"--ntasks={num_nodes}", "--ntasks-per-node=1"]
    limits = [str(world_size), str(job.ranks_per_node), str(job.grace_s)]
    return [*command, sys.executable, "-m", "megatron_mosaic.launch.slurm.node", *limits, *words]


def main(words: Sequence[str]) -> int:
    """Exit status 2 for a wrong run directory or plan, 1 where no plan could be made."""
    try:
        return Batch(Path(words[0]).resolve(), os.environ).run()
    except MosaicError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"mosaic: no plan for these nodes: see above (exit status {error.returncode})", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
