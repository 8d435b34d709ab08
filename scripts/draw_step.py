"""Steps of vlm_7b on 8 H100 under different plans, as SVGs in docs/figures. Times are the simulator's.

    step        four ways to lay out and order the same modules
    schedules   every schedule there is, on the same layouts

python scripts/draw_step.py                  # write the pictures
python scripts/draw_step.py --stdout step    # print one, for the test that compares
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, ScheduleChoice, validate_plan
from megatron_mosaic.schedules.timeline import Timeline
from megatron_mosaic.units import format_seconds

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
SET_UP = ["cluster=h100_1x8", "workload.training.format=bf16"]
ALL = RankSet.block(0, 8)


PIPELINE = Layout(pp=4, dp=2)
REPLICAS = Layout(dp=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A plan with its title and what it is. `unit` 0: the schedule decides; `share`: of the SMs, for the encoder."""

    title: str
    text: str
    schedule: str
    encoder: Layout = REPLICAS
    unit: int = 0
    share: float = 1.0
    llm: Layout = PIPELINE


STEP = (
    Panel(
        title="homogeneous",
        text="the encoder inherits the llm's pp4 dp2",
        schedule="1f1b",
        encoder=PIPELINE,
    ),
    Panel(title="heterogeneous", text="the encoder has dp8, modules take turns", schedule="1f1b"),
    Panel(
        title="nested",
        text="dp8, and units of 4 microbatches inside the llm's pipeline",
        schedule="nested",
        unit=4,
    ),
    Panel(
        title="shared",
        text="dp8 on a quarter of each GPU's SMs, beside the llm on the rest",
        schedule="overlap",
        unit=4,
        share=0.25,
    ),
)
SCHEDULES = (
    Panel(title="1f1b", text="modules take turns, microbatch by microbatch", schedule="1f1b"),
    Panel(
        title="interleaved",
        text="two virtual stages on each of the llm's ranks",
        schedule="interleaved",
        llm=Layout(pp=4, vpp=2, dp=2),
    ),
    Panel(
        title="three_phase",
        text="all of the encoder, then the llm, then the encoder back",
        schedule="three_phase",
        unit=4,
    ),
    Panel(
        title="nested",
        text="units of the encoder between the llm's actions, few of them alive",
        schedule="nested",
        unit=4,
    ),
    Panel(title="bubble_fill", text="the encoder where the llm's pipeline idles", schedule="bubble_fill", unit=4),
    Panel(
        title="overlap",
        text="beside each other, a quarter of the SMs for the encoder",
        schedule="overlap",
        unit=4,
        share=0.25,
    ),
)
PICTURES = {"step": (STEP, 32), "schedules": (SCHEDULES, 16)}  # and samples of the step
COLOURS = {"vision": ("#c2570c", "#f3a871"), "llm": ("#1f4e8c", "#8fb3de")}  # forward, backward
TAIL = "#98a2ad"
WIDTH, LEFT, RIGHT, ROW, TITLE, GAP, TOP = 880, 84, 12, 13, 20, 12, 30
INK, DIM, IDLE = "#1d2530", "#66707c", "#eef1f4"


def build_plan(panel: Panel, samples: int) -> Plan:
    """The panel's plan on 8 ranks; a microbatch is one sample of each of the llm's replicas."""
    share, shared = panel.share, panel.share < 1
    vision = ModulePlan(ranks=ALL, layout=panel.encoder, unit=panel.unit, quota=Quota(share=share))
    llm = ModulePlan(ranks=ALL, layout=panel.llm, quota=Quota(share=1 - share if shared else 1.0))
    return Plan(
        workload="vlm_7b",
        world_size=8,
        global_batch_size=samples,
        micro_batch_size=1,
        schedule=ScheduleChoice(panel.schedule),
        modules={"vision": vision, "llm": llm},
    )


def predict(plan: Plan) -> Timeline:
    """The plan's step on the simulator."""
    planned = apply_overrides(plan, SET_UP)
    task = planned.build_task(None)
    validate_plan(planned.plan, task.workload, task.cluster)
    return simulate(planned.plan, task.cost_model()).timeline()


def render(name: str) -> str:
    """A picture's text."""
    panels, samples = PICTURES[name]
    steps = [predict(build_plan(panel, samples)) for panel in panels]
    end_s = max(step.end_s for step in steps)
    scale = (WIDTH - LEFT - RIGHT) / end_s
    marks, y = render_legend(), TOP
    for panel, step in zip(panels, steps, strict=True):
        title = f'<tspan font-weight="600">{panel.title}</tspan>'
        marks.append(f'<text x="0" y="{y + 12}" fill="{INK}">{title}: {panel.text}</text>')
        saved = 1 - step.end_s / steps[0].end_s
        told = f"{format_seconds(step.end_s)}" + (f", {-saved:+.0%}" if step is not steps[0] else "")
        marks.append(f'<text x="{WIDTH - RIGHT}" y="{y + 12}" fill="{INK}" text-anchor="end">{told}</text>')
        drawn, height = render_step(step, y + TITLE, scale)
        marks += drawn
        y += TITLE + height + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
    head += 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12">'
    title = f"<title>One step of a 7B vision-language model on 8 GPUs: {name}</title>"
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
    """Refresh the pictures in docs/."""
    FIGURES.mkdir(exist_ok=True)
    for name in PICTURES:
        (FIGURES / f"{name}.svg").write_text(render(name), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stdout"]:
        sys.stdout.write(render(sys.argv[2]))
    else:
        write()
