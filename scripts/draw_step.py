"""One step of vlm_7b on 8 H100 under four plans, as an SVG: docs/figures/step.svg. Times are the simulator's.

python scripts/draw_step.py            # write the picture
python scripts/draw_step.py --stdout   # print it, for the test that compares
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, ScheduleChoice, validate_plan
from megatron_mosaic.schedules.timeline import Timeline
from megatron_mosaic.units import format_seconds

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures" / "step.svg"
SET_UP = ["cluster=h100_1x8", "workload.training.format=bf16"]
ALL = RankSet.block(0, 8)
LLM = Layout(pp=4, dp=2)

# Title, what it is, schedule, layout and unit of the encoder (0: the schedule decides), its share of the SMs.
# The llm is pp4 dp2 in all of them.
PLANS = (
    ("homogeneous", "the encoder inherits the llm's pp4 dp2", "1f1b", LLM, 0, 1.0),
    ("heterogeneous", "the encoder has dp8, modules take turns", "1f1b", Layout(dp=8), 0, 1.0),
    ("nested", "dp8, and units of 4 microbatches inside the llm's pipeline", "nested", Layout(dp=8), 4, 1.0),
    ("shared", "dp8 on a quarter of each GPU's SMs, beside the llm on the rest", "overlap", Layout(dp=8), 4, 0.25),
)
COLOURS = {"vision": ("#c2570c", "#f3a871"), "llm": ("#1f4e8c", "#8fb3de")}  # forward, backward
TAIL = "#98a2ad"
WIDTH, LEFT, RIGHT, ROW, TITLE, GAP, TOP = 880, 84, 12, 13, 20, 12, 30
INK, DIM, IDLE = "#1d2530", "#66707c", "#eef1f4"


def build_plan(schedule: str, layout: Layout, unit: int, share: float) -> Plan:
    """32 samples on 8 ranks, 16 microbatches for each of the llm's two replicas."""
    vision = ModulePlan(ranks=ALL, layout=layout, unit=unit, quota=Quota(share=share))
    llm = ModulePlan(ranks=ALL, layout=LLM, quota=Quota(share=1 - share if share < 1 else 1.0))
    return Plan(
        workload="vlm_7b",
        world_size=8,
        global_batch_size=32,
        micro_batch_size=1,
        schedule=ScheduleChoice(schedule),
        modules={"vision": vision, "llm": llm},
    )


def predict(plan: Plan) -> Timeline:
    """The plan's step on the simulator."""
    planned = apply_overrides(plan, SET_UP)
    task = planned.build_task(None)
    validate_plan(planned.plan, task.workload, task.cluster)
    return simulate(planned.plan, task.cost_model()).timeline()


def render() -> str:
    """The picture's text."""
    steps = [predict(build_plan(*words)) for _, _, *words in PLANS]
    end_s = max(step.end_s for step in steps)
    scale = (WIDTH - LEFT - RIGHT) / end_s
    marks, y = render_legend(), TOP
    for (title, text, *_), step in zip(PLANS, steps, strict=True):
        marks.append(f'<text x="0" y="{y + 12}" fill="{INK}"><tspan font-weight="600">{title}</tspan>: {text}</text>')
        saved = 1 - step.end_s / steps[0].end_s
        told = f"{format_seconds(step.end_s)}" + (f", {-saved:+.0%}" if step is not steps[0] else "")
        marks.append(f'<text x="{WIDTH - RIGHT}" y="{y + 12}" fill="{INK}" text-anchor="end">{told}</text>')
        drawn, height = render_step(step, y + TITLE, scale)
        marks += drawn
        y += TITLE + height + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
    head += 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12">'
    title = "<title>One step of a 7B vision-language model on 8 GPUs under four plans</title>"
    return "\n".join([head, title, f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>', *marks, "</svg>"]) + "\n"


def render_legend() -> list[str]:
    """Colours, on one line."""
    entries = [
        (colour, f"{module} {kind}")
        for module, colours in COLOURS.items()
        for colour, kind in zip(colours, ("forward", "backward"), strict=True)
    ]
    entries += [(TAIL, "gradients, optimizer"), (IDLE, "idle")]
    marks, x = [], 0
    for colour, name in entries:
        marks.append(f'<rect x="{x}" y="4" width="12" height="12" fill="{colour}"/>')
        marks.append(f'<text x="{x + 17}" y="14" fill="{DIM}">{name}</text>')
        x += 36 + 7 * len(name)
    return marks


def render_step(step: Timeline, top: int, scale: float) -> tuple[list[str], int]:
    """A row for each class of alike ranks, two where modules run beside each other; and the height of all."""
    ranks = sorted({span.rank for span in step.spans})
    marks, y = [], top
    for rank in ranks:
        spans = [span for span in step.spans if span.rank == rank]
        tracks = overlapping([(span.lane, span.start_s, span.end_s) for span in spans])
        height = ROW * len(tracks)
        marks.append(
            f'<text x="0" y="{y + height / 2 + 3:g}" fill="{DIM}" font-size="11">{step.name_ranks(rank)}</text>'
        )
        marks.append(f'<rect x="{LEFT}" y="{y}" width="{step.end_s * scale:.1f}" height="{height - 1}" fill="{IDLE}"/>')
        for row, lanes in enumerate(tracks):
            for span in spans:
                if span.lane in lanes:
                    x, width = LEFT + span.start_s * scale, (span.end_s - span.start_s) * scale
                    box = f'x="{x:.1f}" y="{y + row * ROW}" width="{max(0.4, width - 0.5):.1f}" height="{ROW - 1}"'
                    marks.append(f'<rect {box} fill="{colour_of(span.lane, span.label)}"/>')
        y += height
    return marks, y - top


def overlapping(spans: list[tuple[str, float, float]]) -> list[set[str]]:
    """Lanes in as few rows as it takes for none to lie over another."""
    rows: list[list[tuple[str, float, float]]] = []
    for lane in dict.fromkeys(name for name, _, _ in spans):
        mine = [span for span in spans if span[0] == lane]
        free = next((row for row in rows if not any(a[1] < b[2] and b[1] < a[2] for a in mine for b in row)), None)
        if free is None:
            rows.append(mine)
        else:
            free += mine
    return [{name for name, _, _ in row} for row in rows]


def colour_of(lane: str, label: str) -> str:
    """That of the module, dark for forwards."""
    if lane.startswith("~"):
        return TAIL
    forward, backward = COLOURS[lane.partition(".")[0]]
    return forward if label.removeprefix(lane).lstrip("v0123456789").startswith("F") else backward


def write() -> None:
    """Refresh the picture in docs/."""
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    if "--stdout" in sys.argv[1:]:
        sys.stdout.write(render())
    else:
        write()
