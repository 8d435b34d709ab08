"""The text form of a schedule, parsed strictly (`parse(format(s)) == s`): a line a lane, then the order of all.

    schedule 1f1b microbatches=3 edges=vision>llm units=vision:1,llm:1
    vision.0 | vision.0F0 vision.0F1 vision.0F2 vision.0B0 vision.0B1 vision.0B2
    llm.0    | llm.0F0 llm.0B0 llm.0F1 llm.0B1 llm.0F2 llm.0B2
    order    | vision.0F0 llm.0F0 vision.0F1 llm.0B0 vision.0B0 ...
    tracks   | vision.0:1                                              (only where a lane is off track 0)

Without its `order` line a file is read together with a stage graph, whose ranks decide which lanes take turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.actions import NUMBER, Action
from megatron_mosaic.schedules.lane_work import LaneWork
from megatron_mosaic.schedules.passes import take_turns
from megatron_mosaic.schedules.schedule import Schedule
from megatron_mosaic.schedules.stage_graph import StageGraph
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

ORDER, TRACKS = "order", "tracks"  # no lane has such a name: theirs end in a stage
SCHEDULE_FILE = FileKind(what="a schedule as `mosaic show` prints it", error=ScheduleError, fix="check the path")
_HEADER = re.compile(rf"schedule (\S+) microbatches=({NUMBER}) edges=(\S*) units=(\S+)")
_COUNT = re.compile(rf"([^:]+):({NUMBER})")


def format_schedule(schedule: Schedule) -> str:
    """The text form."""
    edges = ",".join(f"{source}>{target}" for source, target in schedule.work.edges)
    units = ",".join(f"{module}:{size}" for module, size in schedule.work.units.items())
    lines = {lane: " ".join(map(str, actions)) for lane, actions in schedule.lanes.items()}
    lines[ORDER] = " ".join(map(str, schedule.order))
    if any(schedule.tracks.values()):
        lines[TRACKS] = " ".join(f"{lane}:{track}" for lane, track in schedule.tracks.items() if track)
    width = max(map(len, lines))
    header = f"schedule {schedule.name} microbatches={schedule.num_microbatches} edges={edges} units={units}"
    return "\n".join([header, *(f"{name:<{width}} | {text}" for name, text in lines.items())]) + "\n"


def parse_schedule(text: str, graph: StageGraph | None = None) -> Schedule:
    """The schedule written in text form. ScheduleError on anything else, and for a missing order without a graph."""
    header, *rest = text.rstrip("\n").split("\n")
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ScheduleError(
            "line 1",
            got=repr(header[:200]),
            expected="schedule NAME microbatches=N edges=A>B,... units=A:1,...",
            fix="correct the header",
        )
    name, num_microbatches, edges, units = match.groups()
    lines = _split_lines(rest)
    order, tracks = lines.pop(ORDER, None), lines.pop(TRACKS, "")
    work = LaneWork(
        num_microbatches=int(num_microbatches),
        edges=tuple(_pair(part, ">") for part in edges.split(",") if part),
        units=_parse_counts("line 1: units", units.split(","), "module"),
        lanes={lane: _parse_actions(actions) for lane, actions in lines.items()},
    )
    return Schedule(
        name=name,
        work=work,
        order=_order_of(work, graph) if order is None else _parse_actions(order),
        tracks=_parse_counts(TRACKS, tracks.split(), "lane"),
    )


def load_schedule(path: str | Path, graph: StageGraph | None = None) -> Schedule:
    """The schedule in a text file. ScheduleError names the file."""
    text = read_text_file(path, SCHEDULE_FILE)
    try:
        return parse_schedule(text, graph)
    except ScheduleError as error:
        raise ScheduleError(
            f"{show_path(path)}: {error.where}", got=error.got, expected=error.expected, fix=error.fix
        ) from error


def _order_of(work: LaneWork, graph: StageGraph | None) -> tuple[Action, ...]:
    """Lanes that share ranks take turns."""
    if graph is None:
        raise ScheduleError(
            "order", got="no such line", expected="all actions in one order", fix="add it, or name the plan it is for"
        )
    foreign = [lane for lane in work.lanes if lane not in graph.occupies]
    if foreign:
        raise ScheduleError(
            f"lane {foreign[0]}", got="no such lane in the plan", expected=f"one of {[*graph.lanes]}", fix="remove it"
        )
    return take_turns(work, graph.occupies)


def _split_lines(lines: list[str]) -> dict[str, str]:
    """Name before the bar -> what stands behind it."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        name, bar, text = line.partition("|")
        if not bar or not name.strip() or name.strip() in found:
            raise ScheduleError(
                f"line {number}", got=repr(line[:200]), expected="LANE | ACTION ACTION ..., each once", fix="correct it"
            )
        found[name.strip()] = text
    return found


def _parse_actions(text: str) -> tuple[Action, ...]:
    return tuple([Action.parse(part) for part in text.split()])


def _parse_counts(where: str, parts: list[str], name: str) -> Mapping[str, int]:
    """`NAME:COUNT` parts, each name once. `name`: of what."""
    counts: dict[str, int] = {}
    for part in parts:
        match = _COUNT.fullmatch(part)
        if match is None or match[1] in counts:
            raise ScheduleError(
                where, got=repr(part), expected=f"{name.upper()}:COUNT, each {name} once", fix="correct the line"
            )
        counts[match[1]] = int(match[2])
    return counts


def _pair(text: str, separator: str) -> tuple[str, str]:
    left, found, right = text.partition(separator)
    if not (left and found and right):
        raise ScheduleError("line 1", got=repr(text), expected=f"A{separator}B", fix="correct the header")
    return left, right
