"""One piece of work of one lane, its text, and which action needs which: one rule a kind.

F   the forward of the stage before (around the ring for the next chunk); on stage 0 what the edges bring
B   its own forward, and the gradients of the stage after; on the last stage those of every consumer
I   as B: gradients of inputs
W   its own I: gradients of weights, whenever there is time
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

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


class Dependency(NamedTuple):
    """The same unit of another virtual stage; in another module, every unit that shares a microbatch."""

    module: str
    stage: int
    kind: Kind
    chunk: int


class Structure(Protocol):
    """What the rules ask of a schedule."""

    @property
    def edges(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def num_stages(self) -> Mapping[str, int]: ...
    @property
    def num_chunks(self) -> Mapping[str, int]: ...
    @property
    def kinds(self) -> Mapping[str, frozenset[Kind]]: ...


def _forward(s: Structure, module: str, stage: int, chunk: int) -> tuple[Dependency, ...]:
    if stage:
        return (Dependency(module, stage - 1, Kind.F, chunk),)
    if chunk:
        return (Dependency(module, s.num_stages[module] - 1, Kind.F, chunk - 1),)
    sources = [source for source, target in s.edges if target == module]
    return tuple(Dependency(a, s.num_stages[a] - 1, Kind.F, s.num_chunks[a] - 1) for a in sources)


def _backward(s: Structure, module: str, stage: int, chunk: int) -> tuple[Dependency, ...]:
    own = Dependency(module, stage, Kind.F, chunk)
    if stage < s.num_stages[module] - 1:
        return own, Dependency(module, stage + 1, _gradient(s, module), chunk)
    if chunk < s.num_chunks[module] - 1:
        return own, Dependency(module, 0, _gradient(s, module), chunk + 1)
    targets = [target for source, target in s.edges if source == module and len(s.kinds[target]) > 1]
    return own, *(Dependency(target, 0, _gradient(s, target), 0) for target in targets)


def _weights(s: Structure, module: str, stage: int, chunk: int) -> tuple[Dependency, ...]:
    return (Dependency(module, stage, Kind.I, chunk),)


def _gradient(s: Structure, module: str) -> Kind:
    """The kind that makes the gradients of a module's inputs."""
    return Kind.B if Kind.B in s.kinds[module] else Kind.I


DEPENDENCIES: Mapping[Kind, Callable[[Structure, str, int, int], tuple[Dependency, ...]]] = {
    Kind.F: _forward,
    Kind.B: _backward,
    Kind.I: _backward,
    Kind.W: _weights,
}
