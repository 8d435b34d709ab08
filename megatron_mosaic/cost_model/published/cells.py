"""Cells of a row as numbers, and the refusal of a row that cannot be predicted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from megatron_mosaic.plan.yaml_text import MAX_COUNT

Row = Mapping[str, str]

_MAX_MEASURED = 1e15  # of seconds, tokens, TFLOPs or bytes in a cell; its inverse is the least


class Refusal(Exception):
    """A row that the model cannot represent; the text is the reason."""


def parse_measured(text: str) -> float | None:
    """The number of a cell that something was measured for: above 0 and not absurd, else nothing."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 1 / _MAX_MEASURED <= value <= _MAX_MEASURED else None


def words_of(text: str) -> frozenset[str]:
    """Runs of letters and digits, in lower case: `A100-80GB SXM` is a100, 80gb, sxm."""
    return frozenset(re.findall(r"[a-z0-9.]+", text.lower()))


class Cells:
    """Numbers of a row; what the cells leave out may be known of the model (`known`: column -> value)."""

    def __init__(self, row: Row, known: Mapping[str, int] | None = None) -> None:
        self.row, self.known = row, known or {}

    def get(self, key: str, default: int) -> int:
        """The number in a cell, else what is known, else `default`."""
        text = self.row.get(key, "")
        try:
            value = float(text) if text else self.known.get(key, default)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise Refusal(f"{key} is {text[:40]!r}, not a number")
        if value < 0:
            raise Refusal(f"{key} is {text[:40]}, below 0")
        if text and value > MAX_COUNT:
            raise Refusal(f"{key} is {text[:40]}, beyond the {MAX_COUNT} that this model takes")
        return int(value)

    def degree(self, key: str, default: int = 1, most: int = MAX_COUNT) -> int:
        """A degree of parallelism, or another count of at least 1."""
        value = self.get(key, default)
        if not 1 <= value <= most:
            raise Refusal(f"{key} is {value}, not a degree of parallelism from 1 to {most}")
        return value

    def positive(self, key: str) -> float:
        """0 where the cell is empty."""
        text = self.row.get(key, "")
        if not text:
            return 0.0
        value = parse_measured(text)
        if value is None:
            raise Refusal(f"{key} is {text[:40]!r}, not a number above 0, or none that can be measured")
        return value

    def need(self, key: str) -> int:
        """A count that nothing can be predicted without."""
        value = self.get(key, 0)
        if value < 1:
            raise Refusal(f"{key} is not stated")
        return value
