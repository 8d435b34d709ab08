"""A file of JSON lines, one a step or a report, that goes on over the starts of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ITERATION = "iteration"


class AppendedLines:
    """Appends lines that name their iteration. `_has_begun`: one was written by this start.

    A run that goes on from a checkpoint appends; what an earlier start had beyond the checkpoint goes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._has_begun = path, False

    def append(self, iteration: int, values: Mapping[str, Any], *, since: int | None = None) -> None:
        """Iterations count from 1, over all starts of a run. `since`: the first that this start trained, where the line
        is of several."""
        if not self._has_begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _keep_before(self._path, iteration if since is None else since)
            self._has_begun = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({ITERATION: iteration, **values}) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines so far; one that is still being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return (json.loads(line) for line in lines if line.endswith("\n"))


def _keep_before(path: Path, iteration: int) -> None:
    """Leave the lines of earlier iterations, whole ones alone: a start may have been killed while it wrote.

    A line that names no iteration is of no earlier one.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if iteration > 1 and path.exists() else []
    steps = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, step in steps if step.get(ITERATION, iteration) < iteration]
    beside = path.with_name(f".{path.name}")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)  # a start that is killed here loses none of the history
