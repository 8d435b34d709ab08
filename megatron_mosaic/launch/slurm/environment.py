"""Which rank a process is that `srun` started: torchrun's variables out of Slurm's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.slurm.hosts import count_tasks, expand_hosts, find_address

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000  # below the ports that Linux gives to clients (32768 and up)


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started the process. A batch script, too, has SLURM_PROCID and SLURM_NTASKS, but no step."""
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment


def rank_environment(
    environment: Mapping[str, str], find_address: Callable[[str], str] = find_address
) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT as Slurm has them; nothing where RANK is
    set (torchrun did it), or where no srun is. What the user set of the last two stays.

    `find_address`: what other hosts reach a host by.
    """
    if "RANK" in environment or not is_task(environment):
        return {}
    found = {
        "RANK": _get(environment, "SLURM_PROCID"),
        "WORLD_SIZE": _get(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        "LOCAL_RANK": _get(environment, "SLURM_LOCALID"),
    }
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE"))
    node = int(environment.get("SLURM_NODEID", "0"))
    if tasks is not None and node < len(counts := count_tasks(tasks)):
        found["LOCAL_WORLD_SIZE"] = str(counts[node])
    if "MASTER_ADDR" not in environment:
        hosts = expand_hosts(_get(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
        # Alone on its host, a job needs no name to resolve.
        found["MASTER_ADDR"] = find_address(hosts[0]) if len(hosts) > 1 else "127.0.0.1"
    if "MASTER_PORT" not in environment:
        found["MASTER_PORT"] = str(meeting_port(environment))
    return found


def meeting_port(environment: Mapping[str, str]) -> int:
    """The same for all ranks of a step; another for the next step, job or restart."""
    job, step, restart = (
        int(environment.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return _FIRST_PORT + (101 * job + 11 * step + restart) % _NUM_PORTS


def take_rank_from_slurm() -> None:
    """Put them into the environment of this process, for Megatron and torch to read."""
    os.environ.update(rank_environment(os.environ))


def describe_start(world_size: int, environment: Mapping[str, str]) -> str:
    """How to start as many ranks here."""
    how = f" (srun --ntasks={world_size}, one task a rank)" if is_task(environment) else ""
    return f"start {world_size} process{'es' * (world_size > 1)}{how}"


def _get(environment: Mapping[str, str], *keys: str) -> str:
    for key in keys:
        if key in environment:
            return environment[key]
    raise ConfigError(
        keys[0], got="not set", expected="as srun sets it", fix="start with srun, or set RANK and the like"
    )
