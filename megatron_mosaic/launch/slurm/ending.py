"""What a job does when its ranks have ended: done, again, or never again. srun's own exit status cannot tell.

srun ends all ranks when one fails, and reports the highest status: 143 for a crash as for a save. So every rank leaves
its own status in a file (`launch/worker.py`); who was killed leaves none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DO_NOT_REQUEUE = 93  # exit status by which a rank says so: NVIDIA Resiliency Extension's convention
EXITS_VARIABLE = "MOSAIC_EXITS_DIR"


class Ending(StrEnum):
    """What the job does next."""

    done = "done"
    requeue = "requeue"
    stopped = "stopped"  # a rank said so
    cancelled = "cancelled"
    crashed = "crashed"
    worn_out = "too many restarts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What is known when the ranks of one start have ended.

    `status` of srun, `exits` rank -> status, as far as ranks left one. `was_told`: Slurm's signal came. `is_cancelled`:
    Slurm ends the job for good. Steps are those in checkpoints; `num_steps` 0: unknown.
    """

    status: int
    exits: Mapping[int, int]
    was_told: bool
    is_cancelled: bool
    saved_steps: int
    num_steps: int
    restarts: int
    max_restarts: int

    @property
    def is_complete(self) -> bool:
        """Whether all ranks ended well, with nothing left to train."""
        if self.status and not (self.was_told and self.exits and not any(self.exits.values())):
            return False
        return self.saved_steps >= self.num_steps if self.num_steps else not self.was_told


def decide(attempt: Attempt) -> Ending:
    """What comes next. A signal counts as its reason even where a rank fails on its way out."""
    if DO_NOT_REQUEUE in (attempt.status, *attempt.exits.values()):
        return Ending.stopped
    if attempt.is_complete:
        return Ending.done
    if attempt.is_cancelled:
        return Ending.cancelled
    if not attempt.was_told and attempt.status:
        return Ending.crashed
    return Ending.requeue if attempt.restarts < attempt.max_restarts else Ending.worn_out


def exit_status(ending: Ending, attempt: Attempt) -> int:
    """The batch script's, by which Slurm and its user judge the job. 2: a rank rejected its input."""
    if ending is Ending.stopped:
        return DO_NOT_REQUEUE
    if ending is Ending.crashed:
        return min((status for status in attempt.exits.values() if status), default=attempt.status)
    return int(ending in (Ending.cancelled, Ending.worn_out))


def note_exit(directory: str | Path, rank: int, status: int) -> None:
    """Leave the status of a rank; rank 0 leaves that it ended well, too."""
    if status or rank == 0:
        (Path(directory) / f"rank-{rank:05d}").write_text(str(status))


def read_exits(directory: str | Path) -> dict[int, int]:
    """Rank -> the status it left."""
    found = {}
    for path in sorted(Path(directory).glob("rank-*")):
        text = path.read_text()
        if text.isdecimal():
            found[int(path.name.removeprefix("rank-"))] = int(text)
    return found
