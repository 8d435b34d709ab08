"""Activation bytes of encoder and generator as the batch grows: nested keeps them, three_phase does not.

Runs `mosaic check` (one step on real processes, with the activation meter) on 2 and 4 stages with M = W U, 2 W U
and 4 W U microbatches: W units of U microbatches are what nested holds. Prints a table, with `--json` one object; with
`--docs` it goes into docs/schedules.md, too. A check that fails, or a bound that is not kept, is exit status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from refresh_docs import put

from megatron_mosaic.any2any.arguments import MIX
from megatron_mosaic.config import load_workload
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.schedules import build_schedule

WORKLOAD = load_workload(["model=any2any-digits"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Samples, how many of them a microbatch has, and by module what nested may hold over what it holds at least."""

    fracs: tuple[float, float, float]  # text alone, two images, a drawing; the rest: one image
    micro_batch_size: int
    max_ratio: dict[str, float]
    schedules: tuple[str, ...] = ("nested", "three_phase")
    words: tuple[str, ...] = ()  # of `mosaic check`


MIXES = {
    "a drawing each": Mix(
        fracs=(0.0, 0.0, 1.0), micro_batch_size=2, max_ratio={"generator": 1.0}, schedules=("nested",)
    ),
    "an image each": Mix(
        fracs=(0.0, 0.0, 1e-9),  # a drawing in a thousand million: the generator has to be possible
        micro_batch_size=2,
        max_ratio={"vision": 1.0},
        schedules=("nested",),
        words=("--freeze", "generator"),  # which has nothing to do
    ),
    "as they come": Mix(
        fracs=(MIX.text_only_frac, MIX.two_image_frac, MIX.generate_frac),
        micro_batch_size=32,  # so that counts of images vary less
        max_ratio={"vision": 1.4, "generator": 1.4},
    ),
}
MIN_GROWTH = 3.0  # of the encoder under three_phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run. Bytes: the most on a rank, of what autograd keeps between forwards and their backwards."""

    mix: str
    pp: int
    schedule: str
    microbatches: int
    vision_units: int  # alive at most, by the schedule
    generator_units: int
    vision_bytes: int
    generator_bytes: int
    llm_bytes: int
    grad_rel_err_max: float


def make_plan(mix: str, pp: int, schedule: str, microbatches: int) -> Plan:
    """Encoder and generator on all ranks of the pipeline."""
    ranks = RankSet.block(0, pp)
    spread = ModulePlan(ranks=ranks, layout=Layout(dp=pp))
    return Plan(
        workload=WORKLOAD.name,
        world_size=pp,
        global_batch_size=MIXES[mix].micro_batch_size * microbatches,
        micro_batch_size=MIXES[mix].micro_batch_size,
        schedule=ScheduleChoice(schedule),
        modules={"vision": spread, "llm": ModulePlan(ranks=ranks, layout=Layout(pp=pp)), "generator": spread},
    )


def measure(mix: str, pp: int, schedule: str, microbatches: int) -> Row:
    """One check of one step. CalledProcessError with its words if it does not pass."""
    plan = make_plan(mix, pp, schedule, microbatches)
    work = build_schedule(plan, WORKLOAD).work
    words = [
        word
        for name, value in zip(("text-only", "two-image", "generate"), MIXES[mix].fracs, strict=True)
        for word in (f"--digits-{name}-frac", str(value))
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.yaml"
        save_plan(plan, path)
        command = [sys.executable, "-m", "megatron_mosaic.cli", "check", str(path), "--steps", "1", "--json", *words]
        command += MIXES[mix].words
        result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    peak = result["peak_activation_bytes_by_module"]
    return Row(
        mix=mix,
        pp=pp,
        schedule=schedule,
        microbatches=microbatches,
        vision_units=work.live_units("vision.0"),
        generator_units=work.live_units("generator.0"),
        vision_bytes=peak["vision"],
        generator_bytes=peak["generator"],
        llm_bytes=peak["llm"],
        grad_rel_err_max=result["grad_rel_err_max"],
    )


def check_rows(rows: list[Row]) -> list[str]:
    """What is not as promised; empty: nothing."""
    wrong = []
    for mix, pp in dict.fromkeys((row.mix, row.pp) for row in rows):
        of = {s: [r for r in rows if (r.mix, r.pp, r.schedule) == (mix, pp, s)] for s in ("nested", "three_phase")}
        for module, most in MIXES[mix].max_ratio.items():
            sizes = [getattr(row, f"{module}_bytes") for row in of["nested"]]
            if not 0 < max(sizes) <= most * min(sizes):
                wrong.append(f"nested, pp {pp}, {mix}: {module} holds {sizes}, more than {most} times the least")
        sizes = [row.vision_bytes for row in of["three_phase"]]
        if sizes and sizes[-1] < MIN_GROWTH * sizes[0]:
            wrong.append(f"three_phase, pp {pp}, {mix}: vision holds {sizes}, and should grow {MIN_GROWTH} times")
        held = {row.vision_units for row in of["nested"]}, {row.generator_units for row in of["nested"]}
        if len(held[0]) > 1 or held[1] != {1}:
            wrong.append(f"nested, pp {pp}: units alive {held}")
    return wrong


def render(rows: list[Row]) -> str:
    """A Markdown table; bytes in MB."""
    lines = [
        "| samples | pp | schedule | M | vision units | vision MB | generator units | generator MB | llm MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mb = [f"{size / 1e6:.2f}" for size in (row.vision_bytes, row.generator_bytes, row.llm_bytes)]
        cells = (row.mix, row.pp, row.schedule, row.microbatches, row.vision_units, mb[0], row.generator_units, *mb[1:])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else there")
    parser.add_argument("--quick", action="store_true", help="equal samples and 2 stages only")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/schedules.md")
    args = parser.parse_args()
    rows = []
    for mix in list(MIXES)[: 2 if args.quick else None]:
        for pp in (2,) if args.quick else (2, 4):
            held = build_schedule(make_plan(mix, pp, "nested", 64), WORKLOAD).work.live_units("vision.0")
            for schedule in MIXES[mix].schedules:
                for times in (1, 2, 4):
                    rows.append(measure(mix, pp, schedule, times * held * pp))
                    print(f"{len(rows)} runs done", file=sys.stderr, flush=True)
    wrong = check_rows(rows)
    print(json.dumps({"rows": [asdict(row) for row in rows], "wrong": wrong}) if args.json else render(rows))
    print("\n".join(wrong), file=sys.stderr)
    if args.docs:
        put("schedules.md", "activations", render(rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
