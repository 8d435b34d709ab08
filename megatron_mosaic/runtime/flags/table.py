"""One row for every argument of Megatron's parser: how it is written, and what becomes of it under a plan.

    honoured    has its Megatron meaning here; `only` these values, where some are named
    plan        the plan decides it; on the command line it may only say the same
    refused     any value but the default is an error
    irrelevant  acts on something that is not here; whoever sets it is told

A test compares the rows with Megatron's parser: a new release cannot bring an argument that nobody has judged.
"""

from __future__ import annotations

import ast
import csv
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("megatron_arguments.csv")


class Verdict(StrEnum):
    """What becomes of an argument under a plan."""

    honoured = "honoured"
    plan = "plan"
    refused = "refused"
    irrelevant = "irrelevant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """An argument as its row says. `reason`: of a refusal, or where the argument acts.

    `needs`   without one of these it would have no effect: `dest`, `dest=value`, or a fact (`experts`), | between them
    `check`   why `mosaic check` refuses it, if it does; but for the values `check_only`
    """

    flags: tuple[str, ...]
    dest: str
    verdict: Verdict
    reason: str
    only: tuple[str, ...]
    needs: tuple[str, ...]
    check: str
    check_only: tuple[str, ...]
    action: str  # a key of command_line.ACTIONS
    type: str  # a key of TYPES
    nargs: str | int | None
    choices: tuple[str, ...]
    default: Any

    @property
    def flag(self) -> str:
        """The flag to name in a message."""
        return self.flags[-1] if self.action == "help" else self.flags[0]

    @property
    def takes_value(self) -> bool:
        return self.action == "store"


def _literal(word: str) -> Any:
    """A Python literal; any other word is itself."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _boolean(word: str) -> bool:
    return bool(word)  # argparse's own reading of type=bool


def _signal(word: str) -> str:
    if word not in signal.Signals.__members__:
        raise ValueError(word)
    return word


TYPES: Mapping[str, Callable[[str], Any] | None] = {
    "": None,
    "int": int,
    "float": float,
    "bool": _boolean,
    "signal": _signal,
    "literal": _literal,
}


@cache
def load_arguments() -> tuple[Argument, ...]:
    """All rows, in the order of Megatron's parser. An argument with two actions has two."""
    with open(TABLE, encoding="utf-8", newline="") as lines:
        return tuple(_argument(row) for row in csv.DictReader(lines, strict=True))


@cache
def arguments_by_dest() -> Mapping[str, Argument]:
    """Where the parsed value is -> its (last) row."""
    return {argument.dest: argument for argument in load_arguments()}


def _argument(row: Mapping[str, str]) -> Argument:
    flags = tuple(row["flags"].split())
    long_flag = next(flag for flag in flags if flag.startswith("--"))
    return Argument(
        flags=flags,
        dest=row["dest"] or long_flag.removeprefix("--").replace("-", "_"),
        verdict=Verdict(row["verdict"]),
        reason=row["reason"],
        only=tuple(row["only"].split()),
        needs=tuple(row["needs"].split("|")) if row["needs"] else (),
        check=row["check"],
        check_only=tuple(row["check_only"].split()),
        action=row["action"],
        type=row["type"],
        nargs=int(row["nargs"]) if row["nargs"].isdecimal() else row["nargs"] or None,
        choices=tuple(row["choices"].split()),
        default=_default(row["default"]),
    )


def _default(text: str) -> Any:
    """A JSON value; any other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
