"""Whether a checkpoint may be loaded: whole, of this workload, and without a pickle that would run something.

    rank 0        tracker -> directory -> plan, workload, sizes, .metadata -> Saved
    every rank    sums and pickled objects of a share of the files

Nothing is built here but what `checkpoint_io` lists, so a refusal comes before anything was run.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CONFIG_FNAME, maybe_load_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.training import checkpointing
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.parallel_state_ext.rebound.checkpoint_io import RefusedPickle, load_metadata, load_object
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.checkpoint_files.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    Manifest,
    complete_iterations,
    describe,
    other_iterations,
    read_manifest,
    require_checksum,
    require_sizes,
    sizes_of,
)

_FORMAT_FILES = {CONFIG_FNAME, ".metadata"}
_COMMON_STATE = ("common_state/", COMMON_STATE_FNAME)  # as names begin: today, and before it was one of the objects


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """A pickled object of a checkpoint: `length` bytes of `file` from `offset` on."""

    name: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that may be loaded. Without plan and manifest: one that was saved without a plan."""

    directory: str
    bytes_by_file: Mapping[str, int]
    objects: Sequence[StoredObject]
    plan: Plan | None = None
    manifest: Manifest | None = None

    def read_common_state(self) -> dict[str, Any]:
        """What is saved once for all ranks: arguments, scheduler, iteration."""
        stored = next(stored for stored in self.objects if stored.name.startswith(_COMMON_STATE))
        with (Path(self.directory) / stored.file).open("rb") as stream:
            state = _read_object(stream, stored)
        return state if stored.file == COMMON_STATE_FNAME else state[0]  # type: ignore[no-any-return]


def inspect_checkpoint(load_dir: str | None, step: int | None, workload: Workload) -> Saved | None:
    """The checkpoint that the tracker file (or `step`) names, once its files are seen to be there and of this workload.

    Called by one rank; `check_share` does the rest.
    """
    directory = _directory_to_load(load_dir, step)
    if directory is None:
        return None
    plan = manifest = None
    sizes = sizes_of(directory)
    if (directory / PLAN_FILE).exists() or (directory / MANIFEST_FILE).exists():
        plan, manifest = _read_plan(directory / PLAN_FILE), read_manifest(directory / MANIFEST_FILE)
        _require_workload(plan, workload, directory)
        require_sizes(directory, sizes, manifest)
        sizes = {name: size for name, size in sizes.items() if name in (*manifest.bytes_by_file, COMMON_STATE_FNAME)}
        for name in _FORMAT_FILES & sizes.keys():  # before they are read
            require_checksum(directory, name, manifest)
        if not manifest.crc32_by_file:
            print_rank_0(f"> mosaic: {directory} has no checksums: a flipped byte in it would not be noticed")
    else:
        print_rank_0(f"WARNING: {directory} has no {PLAN_FILE}: not saved under a plan, its workload is not checked")
    objects = _list_objects(directory, sizes)
    return Saved(directory=str(directory), plan=plan, manifest=manifest, bytes_by_file=sizes, objects=objects)


def check_share(saved: Saved, rank: int, num_ranks: int) -> None:
    """Read this rank's part of the files: sums as they were saved, and no object but of known classes."""
    directory = Path(saved.directory)
    for name in _share_of(saved.bytes_by_file, rank, num_ranks):
        if saved.manifest is not None and name in saved.manifest.bytes_by_file:
            require_checksum(directory, name, saved.manifest)
        with (directory / name).open("rb") as stream:
            for stored in saved.objects:
                if stored.file == name:
                    _require_known_classes(stream, stored, directory)


def _directory_to_load(load_dir: str | None, step: int | None) -> Path | None:
    """A directory in Megatron's format; None if there is nothing to load."""
    if load_dir is None:
        return None
    tracked = _tracked_iteration(Path(load_dir))  # Megatron reads it even if `step` overrides it
    iteration = step or tracked
    if iteration is None:
        return None
    directory = Path(checkpointing.get_checkpoint_name(load_dir, iteration, return_base_dir=True))
    if iteration == 0:  # a release: made by a converter, not by a run
        directory = Path(checkpointing.get_checkpoint_name(load_dir, 0, release=True, return_base_dir=True))
    if not directory.is_dir():
        raise ConfigError(
            f"checkpoint {directory}",
            got="no such directory",
            expected=f"the checkpoint that {load_dir} names as its last",
            fix=other_iterations(directory),
        )
    return directory


def _tracked_iteration(load_dir: Path) -> int | None:
    """The iteration that the tracker file calls complete; 0 for a release; None without a tracker file."""
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(str(load_dir)))
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return 0
    if not text.isdecimal():
        raise ConfigError(
            str(tracker),
            got=repr(text[:40]),
            expected="the number of the last complete iteration",
            fix=f"write there one of {complete_iterations(load_dir)}, which are complete",
        )
    return int(text)


def _read_plan(path: Path) -> Plan:
    try:
        return load_plan(path)
    except PlanError as error:
        raise ConfigError(
            error.where,
            got=error.got,
            expected="the plan that saved this checkpoint",
            fix=other_iterations(path.parent),
        ) from error


def _require_workload(plan: Plan, workload: Workload, directory: Path) -> None:
    for what, got, expected in (
        ("workload", plan.workload, workload.name),
        ("digest", plan.digest, workload.digest),
    ):
        if got != expected:
            raise ConfigError(
                f"{directory / PLAN_FILE}: {what}",
                got=got,
                expected=f"{expected}, the {what} of {workload.name!r} as this run builds it",
                fix="load a checkpoint of this workload, or train with the sizes of the saved one",
            )


def _list_objects(directory: Path, sizes: Mapping[str, int]) -> tuple[StoredObject, ...]:
    """What is pickled in the data files, from `.metadata`, which is read with known classes alone."""
    where, expected = directory / CONFIG_FNAME, "Megatron's torch_dist format, of which this file is a part"
    try:
        if maybe_load_config(str(directory)) is None:
            raise FileNotFoundError("no such file")
        where, expected = directory / ".metadata", "the list of the checkpoint's tensors, in torch's classes alone"
        with where.open("rb") as stream:
            metadata = load_metadata(stream)
        objects = [
            StoredObject(name=index.fqn, file=at.relative_path, offset=at.offset, length=at.length)
            for index, at in metadata.storage_data.items()
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
        ]
        if COMMON_STATE_FNAME in sizes:  # Megatron prefers it
            length = sizes[COMMON_STATE_FNAME]
            objects.insert(0, StoredObject(name=COMMON_STATE_FNAME, file=COMMON_STATE_FNAME, offset=0, length=length))
        elsewhere = [at.relative_path for at in metadata.storage_data.values() if at.relative_path not in sizes]
        if elsewhere:
            raise LookupError(f"tensors in {elsewhere[0]}, which is no file of this checkpoint")
        if not any(stored.name.startswith(_COMMON_STATE) for stored in objects):
            raise LookupError("no common state")
    except Exception as error:  # a file that is torn, or made by someone else, can raise anything
        raise ConfigError(
            f"checkpoint file {where}", got=describe(error), expected=expected, fix=other_iterations(directory)
        ) from error
    return tuple(objects)


def _require_known_classes(stream: io.BufferedReader, stored: StoredObject, directory: Path) -> None:
    try:
        _read_object(stream, stored)
    except Exception as error:  # what is torn, or made by someone else, can raise anything
        known = "if the class is yours, name it with torch.serialization.add_safe_globals in your script, or "
        raise ConfigError(
            f"checkpoint file {directory / stored.file}, object {stored.name}",
            got=describe(error),
            expected="only classes that torch and Megatron list as safe to load",
            fix=(known if isinstance(error, RefusedPickle) else "") + other_iterations(directory),
        ) from error


def _read_object(stream: io.BufferedReader, stored: StoredObject) -> Any:
    stream.seek(stored.offset)
    return load_object(io.BytesIO(stream.read(stored.length)), stored.name)


def _share_of(bytes_by_file: Mapping[str, int], rank: int, num_ranks: int) -> Iterable[str]:
    """This rank's files: the largest first, each to the rank that has least to read."""
    to_read = [0] * num_ranks
    for name, size in sorted(bytes_by_file.items(), key=lambda item: (-item[1], item[0])):
        reader = to_read.index(min(to_read))
        to_read[reader] += size
        if reader == rank:
            yield name
