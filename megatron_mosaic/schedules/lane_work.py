"""What every lane does, each in its own order: a schedule without the order between lanes.

A lane `module.stage` is executed alike by every rank of that pipeline stage. `units[m]` backbone microbatches are
covered by one action of module m; the last unit may cover fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan.yaml_text import MAX_COUNT
from megatron_mosaic.schedules.actions import DEPENDENCIES, FREES, Action, Dependency, Kind
from megatron_mosaic.schedules.pictures import render_row

_KINDS = (frozenset({Kind.F}), frozenset({Kind.F, Kind.B}), frozenset({Kind.F, Kind.I, Kind.W}))


@dataclass(frozen=True, kw_only=True)
class LaneWork:
    """Constructor: every lane of a module runs each of its forwards (and backwards) once."""

    num_microbatches: int
    edges: tuple[tuple[str, str], ...]
    units: Mapping[str, int]
    lanes: Mapping[str, tuple[Action, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", FrozenMap(self.units))
        object.__setattr__(self, "lanes", FrozenMap(self.lanes))
        for key, value in (("microbatches", self.num_microbatches), *self.units.items()):
            if not 1 <= value <= MAX_COUNT:
                raise ScheduleError(f"schedule: {key}", got=value, expected=f"1 to {MAX_COUNT}", fix="correct it")
        idle = [module for module in self.units if f"{module}.0" not in self.lanes]
        if idle or not self.units:
            raise ScheduleError("schedule", got=f"no lanes of {idle}", expected="lanes of every module", fix="add them")
        self.num_stages  # noqa: B018  raises where a lane is missing, or nobody's
        for end in sorted({end for edge in self.edges for end in edge} - {*self.units}):
            raise ScheduleError("schedule: edges", got=end, expected=f"one of {[*self.units]}", fix="add its lanes")
        self.numbers  # noqa: B018  raises where an action is missing, foreign, or there twice

    # -- structure -----------------------------------------------------------------------------------------------

    @cached_property
    def num_stages(self) -> Mapping[str, int]:
        found = dict.fromkeys(self.units, 0)
        for lane in self.lanes:
            module = lane.rpartition(".")[0]
            if module not in found:
                raise _wrong_lane(
                    lane,
                    f"a lane of {module}, which has no unit",
                    f"a lane of {' or '.join(self.units)}",
                    "remove it, or declare its unit",
                )
            found[module] += 1
        for module, count in found.items():
            for lane in [f"{module}.{stage}" for stage in range(count)]:
                if lane not in self.lanes:
                    expected = f"{lane} among them"
                    raise ScheduleError("schedule", got=f"{count} lanes of {module}", expected=expected, fix="add it")
        return found

    @cached_property
    def num_chunks(self) -> Mapping[str, int]:
        """Virtual stages on each pipeline stage of a module; its first lane says how many."""
        return {m: 1 + max([action.chunk for action in self.lanes[f"{m}.0"]], default=0) for m in self.units}

    @cached_property
    def num_units(self) -> Mapping[str, int]:
        return {module: -(-self.num_microbatches // size) for module, size in self.units.items()}

    @cached_property
    def kinds(self) -> Mapping[str, frozenset[Kind]]:
        """What the lanes of a module do: forwards alone (evaluation, frozen), with backwards, or with split ones."""
        found = {module: frozenset(action.kind for action in self.lanes[f"{module}.0"]) for module in self.units}
        for module, kinds in found.items():
            if kinds not in _KINDS:
                raise ScheduleError(
                    f"schedule: lane {module}.0",
                    got=f"kinds {', '.join(sorted(kinds)) or 'none'}",
                    expected="F; F and B; or F, I and W",
                    fix="add what is missing, or remove what is too much",
                )
        return found

    def has_backward(self, module: str) -> bool:
        """False in a forward-only (evaluation) schedule, and of a module behind which nothing is trained."""
        return len(self.kinds[module]) > 1

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
        covered = self.microbatches_of(action.module, action.unit)
        return tuple(
            Action(d.module, d.stage, d.kind, unit, d.chunk)
            for d in self._dependencies(action.module, action.stage, action.chunk, action.kind)
            for unit in ((action.unit,) if d.module == action.module else self.units_covering(d.module, covered))
        )

    def live_units(self, lane: str) -> int:
        """Most units whose forward has run and whose backward has not, at any moment; 0 without backwards."""
        live = most = 0
        if self.has_backward(lane.rpartition(".")[0]):
            for action in self.lanes[lane]:
                live += (action.kind is Kind.F) - (action.kind in FREES)
                most = max(most, live)
        return most

    def _dependencies(self, module: str, stage: int, chunk: int, kind: Kind) -> tuple[Dependency, ...]:
        return DEPENDENCIES[kind](self, module, stage, chunk)

    # -- the same in numbers: a search orders actions by the million ---------------------------------------------

    @cached_property
    def numbers(self) -> ActionNumbers:
        """Every action as a number, lane by lane in the lane's order."""
        return ActionNumbers(self)


class ActionNumbers:
    """Actions as numbers 0 .. n - 1, in the order of the lanes, and within a lane in its own order."""

    def __init__(self, work: LaneWork) -> None:
        self.actions: list[Action] = []
        self.lane: list[int] = []  # action -> number of its lane
        self.lanes = tuple(work.lanes)
        self.first: list[int] = []  # lane -> its first action; one more at the end
        self._of_block: dict[tuple[str, int, Kind, int], list[int]] = {}  # all units of one kind of a virtual stage
        for lane_number, (lane, actions) in enumerate(work.lanes.items()):
            self.first.append(len(self.actions))
            self._add_lane(work, lane, actions)
            self.lane += [lane_number] * len(actions)
        self.first.append(len(self.actions))
        self.number_of = dict(zip(self.actions, range(len(self.actions))))
        self.needs = self._find_needs(work)

    def _add_lane(self, work: LaneWork, lane: str, actions: tuple[Action, ...]) -> None:
        module, _, stage_text = lane.rpartition(".")
        num_stages, stage = work.num_stages[module], int(stage_text)
        assert stage < num_stages
        num_units, kinds, chunks = work.num_units[module], work.kinds[module], range(work.num_chunks[module])
        blocks = {(kind, chunk): [-1] * num_units for kind, chunk in product(sorted(kinds), chunks)}
        number = len(self.actions)
        for action in actions:
            if action[0] != module or action[1] != stage:
                foreign = [str(other) for other in actions if other.lane != lane]
                raise _wrong_lane(lane, foreign, f"actions of {lane} only", "move them to their lane")
            block = blocks.get((action[2], action[4]))
            if block is None or not 0 <= action[3] < num_units or block[action[3]] >= 0:
                raise _wrong_lane(lane, str(action), _whole_lane(num_units, kinds, len(chunks)), "remove or correct it")
            block[action[3]] = number
            number += 1
        for (kind, chunk), block in blocks.items():
            if -1 in block:
                missing = Action(module, stage, kind, block.index(-1), chunk)
                picture = _render_missing(lane, actions, missing)
                raise _wrong_lane(lane, picture, _whole_lane(num_units, kinds, len(chunks)), "add it")
            self._of_block[module, stage, kind, chunk] = block
        self.actions.extend(actions)

    def _find_needs(self, work: LaneWork) -> list[tuple[int, ...]]:
        """By action, the numbers of the actions that it needs."""
        needs: list[tuple[int, ...]] = [()] * len(self.actions)
        for (module, stage, kind, chunk), numbers in self._of_block.items():
            columns: list[list[tuple[int, ...]]] = []
            for d in DEPENDENCIES[kind](work, module, stage, chunk):
                needed = self._of_block[d.module, d.stage, d.kind, d.chunk]
                if d.module == module or work.units[d.module] == work.units[module]:
                    columns.append([(number,) for number in needed])
                else:
                    ranges = (
                        work.units_covering(d.module, work.microbatches_of(module, u)) for u in range(len(numbers))
                    )
                    columns.append([tuple(needed[units.start : units.stop]) for units in ranges])
            for number, parts in zip(numbers, zip(*columns) if columns else ()):
                needs[number] = parts[0] if len(parts) == 1 else sum(parts, ())
        return needs


def _wrong_lane(lane: str, got: object, expected: str, fix: str) -> ScheduleError:
    return ScheduleError(f"schedule: lane {lane}", got=got, expected=expected, fix=fix)


def _render_missing(lane: str, actions: tuple[Action, ...], missing: Action) -> str:
    """The lane around the last thing done for the unit, which is pointed at."""
    same = [place for place, action in enumerate(actions) if action.unit == missing.unit]
    names = [str(action).removeprefix(lane) for action in actions]
    row = render_row(names, same[-1] if same else len(names))
    return f"no {missing}\n{lane} | {row}  is all of unit {missing.unit}"


def _whole_lane(num_units: int, kinds: frozenset[Kind], num_chunks: int) -> str:
    names = " and ".join(sorted(kinds))
    return f"{names} of each unit 0..{num_units - 1} once" + (f", of {num_chunks} chunks" if num_chunks > 1 else "")
