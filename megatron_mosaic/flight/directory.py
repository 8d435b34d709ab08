"""Where the lines of a job's ranks on this host are: the launcher says so, or all ranks of a job derive the same place.

Without a launcher of ours (torchrun, srun) it is a private directory below the user's temporary one, named by what the
ranks of one job on one host have in common. It is removed when the last rank ends well, and stays for a reader when one
does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.flight.line import DIRECTORY_VARIABLE

# What tells one job from another; the agent of torchrun is every rank's parent.
_JOB = [
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
]


def name_of_job(environment: Mapping[str, str], parent: int) -> str:
    """The same for all ranks of a job on one host, and no other job's."""
    keys = [f"{key}={environment[key]}" for key in _JOB if key in environment]
    if "TORCHELASTIC_RUN_ID" in environment or not keys:
        keys.append(f"parent={parent}")
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def make_directory() -> str:
    """The directory of this process's job, made if it is not there."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given:
        return given
    directory = Path(tempfile.gettempdir()) / f"mosaic-flight-{os.getuid()}" / name_of_job(os.environ, os.getppid())
    for path in (directory.parent, directory):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                str(path),
                got=f"mode {stat.filemode(found.st_mode)} of user {found.st_uid}",
                expected="a directory that only this user can enter",
                fix=f"remove it, or set ${DIRECTORY_VARIABLE} or $TMPDIR to a place of your own",
            )
    return str(directory)


def remove_directory(directory: str) -> None:
    """Remove it with the last rank's line; what tells of a failure stays."""
    with contextlib.suppress(OSError):
        Path(directory).rmdir()
