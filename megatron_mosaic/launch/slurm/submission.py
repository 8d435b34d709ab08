"""A plan as a request to Slurm: how many nodes, who is idle, which words sbatch gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.slurm.job import Form
from megatron_mosaic.launch.slurm.launcher_file import LauncherSection
from megatron_mosaic.plan import Plan

_LEAST_GRACE_S, _MARGIN_S = 5, 30  # for the ranks to save in; before the limit, for Slurm to start the job anew
SCRIPT = Path(__file__).with_name("job.sbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Nodes of equal ranks; rank r is on node r // `ranks_per_node`. `num_idle`: ranks of these nodes without a module,
    those beyond the plan's world among them."""

    num_ranks: int
    ranks_per_node: int
    num_idle: int

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)


def allocate(plan: Plan, ranks_per_node: int) -> Allocation:
    """As few nodes as hold the plan's ranks, whatever its cluster has."""
    nodes = -(-plan.world_size // ranks_per_node)
    busy: set[int] = set()
    for module in plan.modules.values():
        busy |= set(module.ranks)
    return Allocation(
        num_ranks=plan.world_size, ranks_per_node=ranks_per_node, num_idle=nodes * ranks_per_node - len(busy)
    )


def grace_s(section: LauncherSection) -> int:
    """How long ranks may take to save, so that time is left to start the job anew."""
    return max(_LEAST_GRACE_S, section.signal_before_s - _MARGIN_S)


def sbatch_command(section: LauncherSection, allocation: Allocation, num_gpus: int, directory: Path) -> list[str]:
    """sbatch's words for the run directory; `num_gpus` of a node to ask for, 0: none are asked for."""
    nodes = allocation.num_nodes
    least = section.min_nodes or nodes
    if least > nodes:
        raise ConfigError(
            "launcher.min_nodes", got=least, expected=f"at most {nodes}, the plan's nodes", fix="lower it"
        )
    tasks, cpus = (
        (allocation.ranks_per_node, section.cpus_per_rank)
        if section.form is Form.srun
        else (1, allocation.ranks_per_node * section.cpus_per_rank)
    )
    words = [
        "sbatch",
        "--parsable",
        f"--job-name={section.job_name}",
        f"--nodes={nodes if least == nodes else f'{least}-{nodes}'}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        f"--time={section.time_min}",
        f"--signal=B:{section.signal}@{section.signal_before_s}",
        f"--output={directory}/slurm-%j.log",
        f"--export=ALL,MOSAIC_PYTHON={sys.executable}",
    ]
    words += [f"--gpus-per-node={num_gpus}"] if num_gpus else []
    words += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(section, key))]
    return [*words, *section.sbatch, str(directory / SCRIPT.name), str(directory)]


def submit(command: Sequence[str]) -> str:
    """The id of the job. ConfigError with sbatch's own words."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("sbatch", got="no such command", expected="Slurm's", fix="run it where Slurm is") from error
    if asked.returncode:
        raise ConfigError(
            "sbatch",
            got=asked.stderr.strip() or f"exit status {asked.returncode}",
            expected="a job that Slurm accepts",
            fix="change launcher.*, or submit the run directory by hand",
        )
    return asked.stdout.strip().partition(";")[0]  # job;cluster
