"""Local measurements that replace constants of a GPU type: what `mosaic calibrate --gpu-type` writes.

gpu_type: 1
base: h100_sxm
bandwidth_frac: 0.87
sources: {bandwidth_frac: "measured 2026-11-21 by mosaic calibrate on NVIDIA H100 80GB HBM3, torch 2.13.0"}

The datasheet's numbers, and the constants that the file leaves out, are those of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import CONSTANTS, GpuTypeFile
from megatron_mosaic.plan.yaml_text import describe_violation, lines_of_keys, parse_section
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

FORMAT_VERSION = 1
SUFFIX = ".yaml"


def load_gpu_type_file(path: str | Path, bases: Collection[str]) -> GpuTypeFile:
    """What a file says. ConfigError names file and line; `bases` are the names that `base` may have."""
    kind = FileKind(what="a GPU type file", error=ConfigError, fix=_remake(bases))
    where, text = show_path(path), read_text_file(path, kind)
    data = parse_section(text, kind, where=where)
    lines = lines_of_keys(text)
    try:
        found = GpuTypeFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        parts = describe_violation(error, known=f"one of {list(GpuTypeFile.model_fields)}")
        if first["type"] == "float_type" and _is_number(first["input"]):
            number = yaml.safe_dump(float(first["input"])).split()[0]
            parts["fix"] = f"write {number}, with a point and without quotes: this is text in YAML"
        parts["where"] = f"{where}:{_line(lines, first['loc'])}: {parts['where']}"
        raise ConfigError(**parts) from error
    _validate_names(where, found, lines, bases)
    return found


def format_gpu_type_file(base: str, constants: Mapping[str, float], source: str) -> str:
    """YAML text that `load_gpu_type_file` reads; `source` is said of each constant, rounded to five digits."""
    data: dict[str, Any] = {"gpu_type": FORMAT_VERSION, "base": base}
    data |= {name: float(f"{value:.5g}") for name, value in constants.items()}
    return yaml.safe_dump(data | {"sources": dict.fromkeys(constants, source)}, sort_keys=False, width=160)


def _validate_names(
    path: str, found: GpuTypeFile, lines: Mapping[tuple[str, ...], int], bases: Collection[str]
) -> None:
    """The base is known; sources and constants are the same names."""
    if found.base not in bases:
        raise ConfigError(
            f"{path}:{_line(lines, ('base',))}: base",
            got=found.base,
            expected=f"one of {sorted(bases)}",
            fix="name the GPU type whose datasheet holds",
        )
    for name in found.constants:
        if name not in found.sources:
            raise ConfigError(
                f"{path}:{_line(lines, (name,))}: {name}",
                got="a number without a source",
                expected="where it comes from",
                fix=f"add sources: {{{name}: ...}}",
            )
    for name in found.sources:
        if name not in found.constants:
            raise ConfigError(
                f"{path}:{_line(lines, ('sources', name))}: sources.{name}",
                got="a source without its number",
                expected=f"one of {list(found.constants)}",
                fix=f"remove it, or add {name}: ..." if name in CONSTANTS else "remove it or correct its spelling",
            )


def _line(lines: Mapping[tuple[str, ...], int], path: tuple[int | str, ...]) -> int:
    """The line of a key; of what should hold it where it is missing."""
    keys = tuple(map(str, path))
    return next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), 1)


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and float(value) > 0
    except ValueError:
        return False


def _remake(bases: Collection[str]) -> str:
    return f"make one with `mosaic calibrate --gpu-type BASE --out FILE`, BASE one of {sorted(bases)}"
