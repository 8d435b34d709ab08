"""One piece of work of one lane, and its text."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from megatron_mosaic.errors import ScheduleError

NUMBER = "[0-9]{1,7}"  # more digits than any count needs; Python refuses to read thousands of them
_ACTION = re.compile(rf"([a-z][a-z0-9_]*)\.({NUMBER})(?:v([1-9][0-9]{{0,6}}))?([FBIW])({NUMBER})")


class Kind(StrEnum):
    """What an action computes."""

    F = "F"  # forward
    B = "B"  # full backward
    I = "I"  # backward, input gradients only
    W = "W"  # backward, weight gradients only

    __hash__ = str.__hash__  # Enum's own is Python code, and a search hashes actions by the million


FREES = frozenset({Kind.B, Kind.W})  # after these a unit's activations are gone


class Action(NamedTuple):
    """One piece of work of one lane, e.g. `llm.0F3`: stage 0 of `llm`, forward, unit 3."""

    module: str
    stage: int
    kind: Kind
    unit: int
    chunk: int = 0

    def __str__(self) -> str:
        chunk = f"v{self.chunk}" if self.chunk else ""
        return f"{self.module}.{self.stage}{chunk}{self.kind}{self.unit}"

    @property
    def lane(self) -> str:
        return f"{self.module}.{self.stage}"

    @classmethod
    def parse(cls, text: str) -> Action:
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(
                "action",
                got=repr(text),
                expected="<module>.<stage>[v<chunk>]<F|B|I|W><unit>, e.g. llm.0F3",
                fix="correct it",
            )
        module, stage, chunk, kind, unit = match.groups()
        return cls(module, int(stage), Kind(kind), int(unit), int(chunk or 0))
