"""The table of a sweep: one row a point, in the order of their numbers, as CSV, in print and as a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

RESULT_FILE, TABLE_FILE, PICTURE_FILE = "result.json", "sweep.csv", "sweep.png"
NUMBERS = ("step_s", "samples_per_s", "peak_bytes", "search_s", "error")


class SweepTable(Callback):
    """Hydra calls it once, in the process that swept, when all points have come back."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        rows = read_rows(directory)
        columns = write_table(rows, directory / TABLE_FILE)
        print(render_table(rows, columns))
        print(f"table   {directory / TABLE_FILE}")
        if draw(rows, columns, directory / PICTURE_FILE):
            print(f"picture {directory / PICTURE_FILE}")


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """Results of the points below it, each with its overrides as columns of their own."""
    found = []
    for path in directory.glob(f"*/{RESULT_FILE}"):
        result = json.loads(path.read_text(encoding="utf-8"))
        words = dict(word.lstrip("+").split("=", 1) for word in result.pop("overrides"))
        found.append((path.parent.name, {"point": path.parent.name, **words, **result}))
    return [row for _, row in sorted(found, key=lambda pair: (len(pair[0]), pair[0]))]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """Write the CSV file; its columns."""
    said = {key: None for row in rows for key in row if key not in NUMBERS}
    columns = [*said, *NUMBERS]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    return columns


def render_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as text, without the texts of errors."""
    shown = [column for column in columns if column != "error"]
    cells = [shown, *([_cell(row.get(column, "")) for column in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def draw(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path) -> bool:
    """Step time of every point, named by what differs; False without matplotlib or without a feasible point."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    if not any(math.isfinite(row["step_s"]) for row in rows):
        return False
    keys = [column for column in columns if column not in (*NUMBERS, "point")]
    same = [key for key in keys if len({row.get(key) for row in rows}) == 1]
    names = [f"{row['point']}: {_name(row, [key for key in keys if key not in same])}" for row in rows]
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [row["step_s"] if math.isfinite(row["step_s"]) else 0.0 for row in rows])
    for position, row in enumerate(rows):
        if not math.isfinite(row["step_s"]):
            axes.text(0.0, position, " no feasible plan", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("predicted step, s")
    axes.set_title(_name(rows[0], same), fontsize="medium")
    figure.savefig(path, dpi=120)
    return True


def _name(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={row.get(key, '')}" for key in keys)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
