"""The group `launcher` of the configuration: how a job asks Slurm for its nodes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from megatron_mosaic.launch.slurm.job import Form
from megatron_mosaic.plan.cluster import Count
from megatron_mosaic.plan.yaml_text import Schema


class Told(StrEnum):
    """The signal that Slurm sends to the batch script before the time limit."""

    TERM = "TERM"
    USR1 = "USR1"
    USR2 = "USR2"


# One word of sbatch's command line each: no spaces, no leading dash.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.,:@=+/%\[\]-]*$", max_length=200)]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[\w.,:@=+/%&|*\[\]-]+)?$", max_length=200)]


class LauncherSection(Schema):
    """`null`: as the cluster, or Slurm, has it. The files of conf/launcher say what each key is."""

    form: Form
    job_name: Name
    partition: Name | None
    account: Name | None
    time_min: Count
    signal: Told
    signal_before_s: Annotated[int, Field(strict=True, ge=10, le=86_400)]
    max_restarts: Annotated[int, Field(strict=True, ge=0, le=10_000)]
    min_nodes: Count | None
    ranks_per_node: Count | None
    gpus_per_node: Annotated[int, Field(strict=True, ge=0, le=1024)] | None
    cpus_per_rank: Count
    sbatch: tuple[Option, ...]
    run_dir: str | None
    script: str | None
