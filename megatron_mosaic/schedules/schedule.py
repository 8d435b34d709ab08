"""The order of work: per lane, which action follows which. No times. `text.py` writes and reads it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan.yaml_text import MAX_COUNT

NUMBER = "[0-9]{1,7}"  # more digits than any count needs; Python refuses to read thousands of them
_ACTION = re.compile(rf"([a-z][a-z0-9_]*)\.({NUMBER})(?:v([1-9][0-9]{{0,6}}))?([FBIW])({NUMBER})")


class Kind(StrEnum):
    """What an action computes."""

    F = "F"  # forward
    B = "B"  # full backward
    I = "I"  # backward, input gradients only
    W = "W"  # backward, weight gradients only

    __hash__ = str.__hash__  # Enum's own is Python code, and a search hashes actions by the million


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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Orders of all lanes, with the module DAG they respect.

    A lane `module.stage` is executed alike by every rank of that pipeline stage. `units[m]` backbone microbatches
    are covered by one action of module m; the last unit may cover fewer.
    Constructor: every lane runs each of its forwards (and backwards) once, and the orders do not deadlock.
    """

    name: str
    num_microbatches: int
    edges: tuple[tuple[str, str], ...]
    units: Mapping[str, int]
    lanes: Mapping[str, tuple[Action, ...]]

    def __post_init__(self) -> None:
        where = f"schedule {self.name!r}"
        for key, value in (("microbatches", self.num_microbatches), *self.units.items()):
            if not 1 <= value <= MAX_COUNT:
                raise ScheduleError(f"{where}: {key}", got=value, expected=f"1 to {MAX_COUNT}", fix="correct the count")
        idle = [module for module in self.units if f"{module}.0" not in self.lanes]
        if idle or not self.units:
            raise ScheduleError(where, got=f"no lanes of {idle}", expected="lanes of every module", fix="add them")
        for lane, actions in self.lanes.items():
            self._validate_lane(lane, actions)
        self.topological_order  # noqa: B018  raises when the orders deadlock

    def num_stages(self, module: str) -> int:
        return self._num_stages[module]

    def num_chunks(self, module: str) -> int:
        """Virtual stages on each pipeline stage of the module."""
        return self._num_chunks[module]

    @cached_property
    def _num_chunks(self) -> Mapping[str, int]:
        """Every lane of a module has the same chunks; the first lane says how many."""
        return {m: 1 + max([action.chunk for action in self.lanes[f"{m}.0"]], default=0) for m in self.units}

    @cached_property
    def _num_stages(self) -> Counter[str]:
        return Counter(lane.rpartition(".")[0] for lane in self.lanes)

    def num_units(self, module: str) -> int:
        return -(-self.num_microbatches // self.units[module])

    def microbatches_of(self, module: str, unit: int) -> range:
        """The backbone microbatches that a unit of the module covers."""
        size = self.units[module]
        return range(unit * size, min((unit + 1) * size, self.num_microbatches))

    def units_covering(self, module: str, microbatches: range) -> range:
        """The module's units that hold any of these microbatches."""
        size = self.units[module]
        return range(microbatches[0] // size, microbatches[-1] // size + 1)

    def needs(self, action: Action) -> tuple[Action, ...]:
        """The actions that must finish before this one may start."""
        if action not in self._known_needs:
            self._known_needs[action] = self._find_needs(action)
        return self._known_needs[action]

    @cached_property
    def _known_needs(self) -> dict[Action, tuple[Action, ...]]:
        return {}

    def _find_needs(self, action: Action) -> tuple[Action, ...]:
        module, stage, unit, chunk = action.module, action.stage, action.unit, action.chunk
        covered = self.microbatches_of(module, unit)
        last = self.num_stages(module) - 1
        if action.kind is Kind.F:
            if stage > 0:
                return (Action(module, stage - 1, Kind.F, unit, chunk),)
            if chunk > 0:
                return (Action(module, last, Kind.F, unit, chunk - 1),)
            return tuple(
                Action(source, self.num_stages(source) - 1, Kind.F, u, self.num_chunks(source) - 1)
                for source, target in self.edges
                if target == module
                for u in self.units_covering(source, covered)
            )
        own = (Action(module, stage, Kind.F, unit, chunk),)
        if stage < last:
            return (*own, Action(module, stage + 1, Kind.B, unit, chunk))
        if chunk < self.num_chunks(module) - 1:
            return (*own, Action(module, 0, Kind.B, unit, chunk + 1))
        return own + tuple(
            Action(target, 0, Kind.B, u)
            for source, target in self.edges
            if source == module
            for u in self.units_covering(target, covered)
            if self.has_backward(target)
        )

    def has_backward(self, module: str) -> bool:
        """False in a forward-only (evaluation) schedule."""
        return any(action.kind is not Kind.F for action in self.lanes[f"{module}.0"])

    @cached_property
    def topological_order(self) -> tuple[Action, ...]:
        """All actions in one order that respects every lane and every dependency."""
        done: dict[Action, None] = {}
        cursor = dict.fromkeys(self.lanes, 0)
        progress = True
        while progress:
            progress = False
            for lane, actions in self.lanes.items():
                while cursor[lane] < len(actions) and all(need in done for need in self.needs(actions[cursor[lane]])):
                    done[actions[cursor[lane]]] = None
                    cursor[lane] += 1
                    progress = True
        stuck = [
            f"{lane} at {actions[cursor[lane]]}" for lane, actions in self.lanes.items() if cursor[lane] < len(actions)
        ]
        if stuck:
            raise ScheduleError(
                f"schedule {self.name!r}",
                got="lanes that wait for each other: " + ", ".join(stuck),
                expected="orders without a cycle",
                fix="reorder those lanes",
            )
        return tuple(done)

    def _validate_lane(self, lane: str, actions: tuple[Action, ...]) -> None:
        where = f"schedule {self.name!r}: lane {lane}"
        module = lane.rpartition(".")[0]
        if module not in self.units:
            raise ScheduleError(where, got="no unit size", expected=f"units[{module!r}]", fix="declare the unit")
        foreign = [str(action) for action in actions if action.lane != lane]
        if foreign:
            raise ScheduleError(where, got=foreign, expected=f"actions of {lane} only", fix="move them to their lane")
        kinds = {action.kind for action in actions}
        for kind in kinds - {Kind.F, Kind.B}:
            raise ScheduleError(where, got=f"kind {kind}", expected="F or B", fix="split backwards are not built yet")
        chunks = range(self.num_chunks(module))
        for kind, chunk in itertools.product(sorted(kinds | {Kind.F}), chunks):
            units = sorted(action.unit for action in actions if (action.kind, action.chunk) == (kind, chunk))
            if units != list(range(self.num_units(module))):
                raise ScheduleError(
                    where,
                    got=f"{kind} of units {units}" + (f" of chunk {chunk}" if len(chunks) > 1 else ""),
                    expected=f"{kind} of each unit 0..{self.num_units(module) - 1} once",
                    fix="add the missing action, or remove the repeated one",
                )
