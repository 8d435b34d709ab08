"""`mosaic import`: a model file from a Hugging Face config or a list of Megatron arguments."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from megatron_mosaic.cli.output import print_json, print_note, write_text
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.importers.hugging_face import import_hugging_face
from megatron_mosaic.plan.importers.megatron_args import import_megatron_arguments
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import format_workload
from megatron_mosaic.plan.yaml_text import parse_yaml
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

CONFIG = FileKind(what="the config.json of a Hugging Face model", error=ConfigError, fix="check the path")
ARGUMENTS = FileKind(what="a text file of Megatron arguments", error=ConfigError, fix="check the path")


def main(arguments: argparse.Namespace) -> int:
    """Print the model file, or write it; say what was assumed."""
    kind, _, path = arguments.source.partition(":")
    if kind not in ("hf", "megatron") or not path:
        raise ConfigError(
            "import: SOURCE",
            got=arguments.source[:100],
            expected="hf:DIR/config.json or megatron:ARGS.txt",
            fix="say what the file is",
        )
    workload, assumed = _import(kind, Path(path))
    text = f"# From {Path(path).name}. Assumed: {'; '.join(assumed) or 'nothing'}.\n{format_workload(workload)}"
    for each in assumed:
        print_note(f"assumed: {each}")
    if arguments.out:
        write_text(arguments.out, text)
    if arguments.json:
        print_json({"model": parse_yaml(text), "assumed": list(assumed), "out": arguments.out})
    elif not arguments.out:
        print(text, end="")
    return 0


def _import(kind: str, path: Path) -> tuple[Workload, tuple[str, ...]]:
    where = show_path(path)
    if kind == "megatron":
        return import_megatron_arguments(read_text_file(path, ARGUMENTS), name=_name(path.stem), where=where)
    if path.is_dir():
        path = path / "config.json"
    text = read_text_file(path, CONFIG)
    try:
        config: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, got=str(error)[:100], expected=CONFIG.what, fix=CONFIG.fix) from error
    return import_hugging_face(config, name=_name(path.resolve().parent.name), where=where)


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_") or "imported"
