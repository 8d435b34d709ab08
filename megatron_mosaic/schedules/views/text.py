"""Timelines as text: a row for each lane of the ranks that do the same.

t (ms)             |0         10        20        |
ranks 0-1 vision.0 |F0==      ....B0====|  busy  60%     `=` still running, `.` a bubble: nothing runs on these ranks
ranks 0-1 llm.0    |    F0====....      |  busy  30%     blank: another lane of these ranks runs
"""

from __future__ import annotations

from megatron_mosaic.schedules.timeline import Timeline
from megatron_mosaic.units import MS


def render_text(timeline: Timeline, *, width: int = 100, end_s: float | None = None) -> str:
    """One row per rank (or ranks that are alike) and lane; time runs right.

    `end_s` sets the scale, so that two timelines can be laid under each other.
    """
    last_s = timeline.end_s
    scale_s = end_s or last_s
    if not timeline.spans or scale_s <= 0:
        return "(empty timeline)"
    cell_s = scale_s / width
    rows, bubbles = timeline.by_row, timeline.bubbles()
    names = {row: f"{timeline.name_ranks(row[0])} {row[1]}" for row in rows}
    margin = max(map(len, names.values()))
    ticks = "".join(f"{tick * cell_s / MS:<10.4g}" for tick in range(0, width, 10))[:width]
    lines = [f"{'t (ms)':<{margin}} |{ticks}| . bubble"]
    for row, spans in rows.items():
        cells = [" "] * width
        for start_s, stop_s in [*bubbles[row[0]], (last_s, scale_s)]:
            first, last = round(start_s / cell_s), min(width, round(stop_s / cell_s))
            cells[first:last] = "." * (last - first)
        for span in spans:
            first = min(width - 1, round(span.start_s / cell_s))
            last = max(first + 1, min(width, round(span.end_s / cell_s)))
            text = span.label.removeprefix(span.lane)
            cells[first:last] = list(text[: last - first].ljust(last - first, "="))
        busy_s = sum(span.end_s - span.start_s for span in spans)
        lines.append(f"{names[row]:<{margin}} |{''.join(cells[:width])}| busy {busy_s / scale_s:4.0%}")
    return "\n".join(lines)
