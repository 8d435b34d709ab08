"""What a Slurm job of ours needs to know of itself at every start: job.json of its run directory, and its steps so far.

RUN_DIR/job.json  plan.yaml  plan.predicted.json  plan-2-nodes.yaml ...  history.jsonl  checkpoints/  report/
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.text_file import FileKind, read_text_file

JOB_FILE, PLAN_FILE, HISTORY_FILE = "job.json", "plan.yaml", "history.jsonl"
_KIND = FileKind(what="job.json as `mosaic submit` writes it", error=ConfigError, fix="give the run directory")
_MARKER = "latest_checkpointed_iteration.txt"  # Megatron's


class Form(StrEnum):
    """Who starts the ranks."""

    srun = "srun"  # one task a rank
    torchrun = "torchrun"  # one task a node, which starts its ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job. `plan.yaml` is for `num_nodes` nodes; for another number `mosaic plan PLAN_WORDS` makes another.

    `script`, `arguments`: what every rank runs, as Python is called, but for the plan. `size_key`: of an override that
    says how large the cluster is, in nodes or, where it ends in `ranks`, in ranks. `num_steps`: at which checkpoint
    training is complete; 0 where nobody knows. `grace_s`: how long ranks that are told to end may take to save.
    `is_predicted`: every plan has a file beside it that says so, for the ranks to lay beside what they measure.
    """

    form: Form
    num_nodes: int
    ranks_per_node: int
    script: tuple[str, ...]
    arguments: tuple[str, ...]
    plan_words: tuple[str, ...]
    size_key: str
    num_steps: int
    checkpoints: str
    max_restarts: int
    grace_s: int
    is_predicted: bool

    def size_word(self, num_nodes: int) -> str:
        """The override that makes a plan for so many nodes."""
        size = num_nodes * self.ranks_per_node if self.size_key.endswith("ranks") else num_nodes
        return f"{self.size_key}={size}"

    @property
    def saved_steps(self) -> int:
        """Steps in the newest checkpoint; 0 without one."""
        marker = Path(self.checkpoints) / _MARKER
        text = marker.read_text().strip() if marker.exists() else "0"
        return int(text) if text.isdecimal() else 0


def plan_file(num_nodes: int, job: Job) -> str:
    """Name of the plan for so many nodes."""
    return PLAN_FILE if num_nodes == job.num_nodes else f"plan-{num_nodes}-nodes.yaml"


def prediction_file(plan: Path) -> Path:
    """What was predicted of this plan, beside it."""
    return plan.with_suffix(".predicted.json")


def save_job(job: Job, directory: Path) -> None:
    """Write job.json."""
    (directory / JOB_FILE).write_text(json.dumps(asdict(job), indent=1) + "\n", encoding="utf-8")


def load_job(directory: Path) -> Job:
    """The job of a run directory. ConfigError for a file that `mosaic submit` did not write."""
    path = directory / JOB_FILE
    try:
        data: Any = json.loads(read_text_file(path, _KIND))
        lists = {key: tuple(map(str, data[key])) for key in ("script", "arguments", "plan_words")}
        return Job(**{**data, **lists, "form": Form(data["form"])})
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(path), got=str(error), expected=_KIND.what, fix=_KIND.fix) from error


def add_history(directory: Path, entry: dict[str, Any]) -> None:
    """Append what became of one start."""
    with (directory / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
