"""A timeline as one HTML page: an SVG with a row per rank and lane, no scripts, nothing from the network."""

from __future__ import annotations

from html import escape

from megatron_mosaic.schedules.timeline import Timeline
from megatron_mosaic.units import format_seconds

ROW, LEFT, WIDTH = 18, 220, 1400  # pixels
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Tol's bright palette


def render_page(title: str, timeline: Timeline) -> str:
    """HTML text. Forwards are dark, backwards light, bubbles (nothing runs on these ranks) red; hover for name and
    times."""
    rows = {row: index for index, row in enumerate(timeline.rows)}
    modules = sorted({lane.partition(".")[0] for _, lane in rows})
    colour = {module: COLOURS[index % len(COLOURS)] for index, module in enumerate(modules)}
    scale = WIDTH / timeline.end_s if timeline.end_s else 0.0
    marks = [
        f'<text x="0" y="{index * ROW + 13}">{escape(timeline.name_ranks(rank))} {escape(lane)}</text>'
        for (rank, lane), index in rows.items()
    ]
    height = {rank: ROW * sum(each == rank for each, _ in rows) for rank, _ in rows}
    first = {rank: index for (rank, _), index in reversed(rows.items())}
    marks += [
        f'<rect class="bubble" x="{LEFT + start * scale:.2f}" y="{first[rank] * ROW}" '
        f'width="{(end - start) * scale:.2f}" height="{height[rank]}" fill="#dd2200" opacity="0.12"/>'
        for rank, idle in timeline.bubbles().items()
        for start, end in idle
    ]
    for span in timeline.spans:
        x, width = LEFT + span.start_s * scale, max(0.5, (span.end_s - span.start_s) * scale)
        opacity = 1 if "F" in span.label.removeprefix(span.lane) else 0.55
        marks.append(
            f'<rect x="{x:.2f}" y="{rows[span.rank, span.lane] * ROW + 2}" width="{width:.2f}" height="{ROW - 4}" '
            f'fill="{colour[span.lane.partition(".")[0]]}" opacity="{opacity}"><title>{escape(span.label)} '
            f"{format_seconds(span.start_s)} - {format_seconds(span.end_s)}</title></rect>"
        )
    legend = " ".join(f'<b style="color:{colour[module]}">{escape(module)}</b>' for module in modules)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<body style="font-family:monospace"><h3>{escape(title)}: {format_seconds(timeline.end_s)}, '
        f"bubbles {timeline.bubble_frac:.0%}</h3><p>{legend}</p>"
        f'<svg width="{LEFT + WIDTH}" height="{len(rows) * ROW}" font-size="12" font-family="monospace">'
        + "".join(marks)
        + "</svg>\n"
    )
