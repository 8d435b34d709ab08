"""Our list of a checkpoint's files: sizes and CRC-32 sums, each summed up by the rank that wrote the file.

CRC-32 finds what disks and networks break; it is no seal, since who can change a file can change the sum beside it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import save_plan

PLAN_FILE = "mosaic_plan.yaml"
MANIFEST_FILE = "mosaic_checkpoint.json"
_PARTIAL = ".partial"
_CHUNK_BYTES = 1 << 20
_WRITTEN_BY_RANK = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself: the plan and every file of Megatron's, by size and sum."""

    iteration: int
    distributed_optimizer: bool
    rng: bool
    bytes_by_file: Mapping[str, int]
    crc32_by_file: Mapping[str, str] = field(default_factory=dict)  # eight hex digits; absent before they were kept


def sum_up_files(directory: Path, rank: int, num_ranks: int) -> dict[str, tuple[int, str]]:
    """File -> (bytes, CRC-32) of what this rank wrote; rank 0 takes what has no writer among the ranks."""
    return {
        name: _checksum(directory / name)
        for name in sizes_of(directory)
        if (writer := _writer_of(name)) == rank or (rank == 0 and writer not in range(num_ranks))
    }


def write_plan(directory: Path, plan: Plan) -> None:
    """The plan that saved it, whole or not at all."""
    partial = directory / f"{PLAN_FILE}{_PARTIAL}"
    save_plan(plan, partial)
    os.replace(partial, directory / PLAN_FILE)


def write_manifest(directory: Path, plan: Plan, manifest: Manifest) -> None:
    """The list that makes a checkpoint whole, whole or not at all."""
    partial = directory / f"{MANIFEST_FILE}{_PARTIAL}"
    content = {"workload": plan.workload, "digest": plan.digest, **asdict(manifest)}
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial, directory / MANIFEST_FILE)


def read_manifest(path: Path) -> Manifest:
    """ConfigError if it is torn."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(
            iteration=int(data["iteration"]),
            distributed_optimizer=bool(data["distributed_optimizer"]),
            rng=bool(data["rng"]),
            bytes_by_file={str(name): int(size) for name, size in data["bytes_by_file"].items()},
            crc32_by_file={str(name): str(value) for name, value in data.get("crc32_by_file", {}).items()},
        )
        if manifest.crc32_by_file and manifest.crc32_by_file.keys() != manifest.bytes_by_file.keys():
            raise ValueError("sums and sizes of different files")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            str(path),
            got=describe(error),
            expected="the list of the checkpoint's files",
            fix=f"{other_iterations(path.parent)}: this one was not saved to its end",
        ) from error


def require_sizes(directory: Path, found: Mapping[str, int], manifest: Manifest) -> None:
    """ConfigError for the first file that is not there or has another size."""
    for name, size in manifest.bytes_by_file.items():
        if found.get(name) != size:
            raise ConfigError(
                f"checkpoint file {directory / name}",
                got="no such file" if name not in found else f"{found[name]} bytes",
                expected=f"{size} bytes, as saved at iteration {manifest.iteration}",
                fix=other_iterations(directory),
            )


def require_checksum(directory: Path, name: str, manifest: Manifest) -> None:
    """ConfigError if a byte of the file is not as it was saved. Nothing if the manifest has no sums."""
    if not manifest.crc32_by_file:
        return
    _, found = _checksum(directory / name)
    expected = manifest.crc32_by_file[name]
    if found != expected:
        raise ConfigError(
            f"checkpoint file {directory / name}",
            got=f"CRC-32 {found}: its bytes changed after they were saved",
            expected=f"{expected}, as saved at iteration {manifest.iteration}",
            fix=other_iterations(directory),
        )


def other_iterations(directory: Path) -> str:
    """Which checkpoints beside this one were saved to their end."""
    steps = complete_iterations(directory.parent, besides=directory)
    return f"use --ckpt-step {steps[-1]}, which is complete" if steps else "load another checkpoint"


def complete_iterations(load_dir: Path, besides: Path | None = None) -> list[int]:
    """The iterations that were signed, in order."""
    found = [path.parent for path in load_dir.glob(f"iter_*/{MANIFEST_FILE}") if path.parent != besides]
    steps = [path.name.removeprefix("iter_") for path in found]
    return sorted(int(step) for step in steps if step.isdecimal())


def describe(error: BaseException) -> str:
    """Class and first line."""
    first_line = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return f"{type(error).__name__}: {first_line}"


def sizes_of(directory: Path) -> dict[str, int]:
    """File -> bytes, the manifest and what was never finished left out."""
    return {
        path.name: path.stat().st_size
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != MANIFEST_FILE and path.suffix != _PARTIAL
    }


def _checksum(path: Path) -> tuple[int, str]:
    """(bytes, CRC-32)."""
    size = value = 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
            size += count
    return size, f"{value:08x}"


def _writer_of(name: str) -> int | None:
    match = _WRITTEN_BY_RANK.fullmatch(name)
    return int(match[1]) if match else None
