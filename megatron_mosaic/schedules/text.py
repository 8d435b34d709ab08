"""The text form of a schedule, one line per lane after a header, parsed strictly (`parse(format(s)) == s`):

schedule 1f1b microbatches=3 edges=vision>llm units=vision:1,llm:1
vision.0 | vision.0F0 vision.0F1 vision.0F2 vision.0B0 vision.0B1 vision.0B2
llm.0    | llm.0F0 llm.0B0 llm.0F1 llm.0B1 llm.0F2 llm.0B2
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.schedule import NUMBER, Action, Schedule
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

SCHEDULE_FILE = FileKind(what="a schedule as `mosaic show` prints it", error=ScheduleError, fix="check the path")
_HEADER = re.compile(rf"schedule (\S+) microbatches=({NUMBER}) edges=(\S*) units=(\S+)")
_UNIT = re.compile(rf"([^:]+):({NUMBER})")


def format_schedule(schedule: Schedule) -> str:
    """The text form."""
    edges = ",".join(f"{source}>{target}" for source, target in schedule.edges)
    units = ",".join(f"{module}:{size}" for module, size in schedule.units.items())
    width = max(len(lane) for lane in schedule.lanes)
    header = f"schedule {schedule.name} microbatches={schedule.num_microbatches} edges={edges} units={units}"
    lines = [f"{lane:<{width}} | {' '.join(map(str, actions))}" for lane, actions in schedule.lanes.items()]
    return "\n".join([header, *lines]) + "\n"


def parse_schedule(text: str) -> Schedule:
    """The schedule written in text form. ScheduleError on anything else."""
    header, *lines = text.rstrip("\n").split("\n")
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ScheduleError(
            "line 1",
            got=repr(header[:200]),
            expected="schedule NAME microbatches=N edges=A>B,... units=A:1,...",
            fix="correct the header",
        )
    name, num_microbatches, edges, units = match.groups()
    lanes: dict[str, tuple[Action, ...]] = {}
    for number, line in enumerate(lines, start=2):
        lane, bar, actions = line.partition("|")
        if not bar or not lane.strip() or lane.strip() in lanes:
            raise ScheduleError(
                f"line {number}", got=repr(line), expected="LANE | ACTION ACTION ..., each lane once", fix="correct it"
            )
        lanes[lane.strip()] = tuple(Action.parse(part) for part in actions.split())
    try:
        return Schedule(
            name=name,
            num_microbatches=int(num_microbatches),
            edges=tuple(_pair(part, ">") for part in edges.split(",") if part),
            units=_parse_units(units),
            lanes=lanes,
        )
    except KeyError as error:
        raise ScheduleError(
            "line 1", got=f"no lane for {error}", expected="lanes of every module", fix="add it"
        ) from error


def load_schedule(path: str | Path) -> Schedule:
    """The schedule in a text file. ScheduleError names the file."""
    text = read_text_file(path, SCHEDULE_FILE)
    try:
        return parse_schedule(text)
    except ScheduleError as error:
        raise ScheduleError(
            f"{show_path(path)}: {error.where}", got=error.got, expected=error.expected, fix=error.fix
        ) from error


def _parse_units(text: str) -> dict[str, int]:
    units: dict[str, int] = {}
    for part in text.split(","):
        match = _UNIT.fullmatch(part)
        if match is None or match[1] in units:
            raise ScheduleError(
                "line 1", got=f"units {part!r}", expected="MODULE:COUNT, each module once", fix="correct the header"
            )
        units[match[1]] = int(match[2])
    return units


def _pair(text: str, separator: str) -> tuple[str, str]:
    left, found, right = text.partition(separator)
    if not (left and found and right):
        raise ScheduleError("line 1", got=repr(text), expected=f"A{separator}B", fix="correct the header")
    return left, right
