"""Which action needs which: one rule a kind.

F   the forward of the stage before (around the ring for the next chunk); on stage 0 what the edges bring
B   its own forward, and the gradients of the stage after; on the last stage those of every consumer
I   as B: gradients of inputs
W   its own I: gradients of weights, whenever there is time
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from megatron_mosaic.schedules.actions import Kind


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
