"""How results reach people: tables on stdout, progress on stderr, or one JSON object."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import ConfigError


def print_json(result: dict[str, Any]) -> None:
    """One object on stdout. Infinite and undefined numbers are not JSON: they become null."""
    print(json.dumps(_with_nulls(result), indent=1, allow_nan=False))


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    return [_with_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; long cells fold on a narrow terminal and are left whole elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    print(title)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False).print(table)


def print_progress(text: str) -> None:
    """A line on stderr when someone watches it."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


class Progress:
    """Lines on stderr: all when someone watches it, else one every few seconds, so that a log shows that it works.

    `_last`: when there was one.
    """

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s, self._last = every_s, time.monotonic()

    def __call__(self, text: str) -> None:
        """A line of something that happened."""
        if sys.stderr.isatty():
            print(text, file=sys.stderr)
        else:
            self.beat(text)

    def beat(self, text: str) -> None:
        """A line when the last one was a while ago."""
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            print(f"mosaic: progress: {text.strip()}", file=sys.stderr, flush=True)


def print_note(text: str) -> None:
    """One line on stderr that is no error: what the user should know about the result."""
    print(f"mosaic: note: {' '.join(text.split())}", file=sys.stderr)


def write_text(path: str, text: str) -> None:
    """Write a result file; ConfigError when the path cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(path, got=str(error), expected="a writable path", fix="create the directory") from error
