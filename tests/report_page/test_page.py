"""The page as a reader has it: small, whole, of one file; drawn by a real browser where one is installed."""

import json
import re
import shutil
import subprocess
from dataclasses import astuple
from pathlib import Path

import pytest

from megatron_mosaic.cli.main import main
from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.report_page.page import encode
from megatron_mosaic.report_page.searched import pareto_front
from megatron_mosaic.search.evaluate import Outcome

MAX_BYTES = 2_000_000
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def write_plan(directory: Path, nodes: int) -> Path:
    """vlm_7b, encoder and backbone on all GPUs of so many nodes."""
    dp = 8 * nodes // 4
    everywhere = RankSet.block(0, 8 * nodes)
    plan = Plan(
        workload="vlm_7b",
        world_size=8 * nodes,
        global_batch_size=8 * dp,
        micro_batch_size=1,
        schedule=ScheduleChoice("nested"),
        modules={
            "vision": ModulePlan(ranks=everywhere, layout=Layout(dp=4 * dp)),
            "llm": ModulePlan(ranks=everywhere, layout=Layout(pp=4, dp=dp)),
        },
    )
    path = directory / "plan.yaml"
    save_plan(plan, path)
    return path


def machine(nodes: int) -> list[str]:
    """Words that name the GPUs, and the numbers that are trained with."""
    return ["cluster=h100_8x8", f"cluster.num_nodes={nodes}", "workload.training.format=bf16"]


def report(directory: Path, nodes: int, *words: str) -> tuple[Path, dict]:
    """The page of such a plan, and the data in it."""
    out = directory / "page.html"
    cluster = machine(nodes)
    assert main(["report", str(write_plan(directory, nodes)), "--out", str(out), *cluster, *words]) == 0
    return out, json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.DOTALL)[1])


def write_run(directory: Path, plan: Path) -> None:
    """A run that took twice as long as predicted, in the files that rank 0 writes."""
    planned = apply_overrides(load_plan(str(plan)), machine(1))
    spans = [astuple(span) for span in simulate(planned.plan, planned.build_task(None).cost_model()).timeline().spans]
    slow = [(rank, lane, 2 * start_s, 2 * end_s, label) for rank, lane, start_s, end_s, label in spans]
    (directory / "timeline.json").write_text(json.dumps({"spans": slow, "seconds": [0.5, 0.6]}))
    (directory / "losses.jsonl").write_text('{"iteration": 1, "loss": 2.5}\n{"iteration": 2, "loss": 2.25}\n')


def test_it_is_one_small_file_for_ten_thousand_gpus(tmp_path):
    out, data = report(tmp_path, 1280, "--no-search")
    text = out.read_text()
    assert len(text.encode()) < MAX_BYTES
    assert not re.search(r"(src|href)\s*=|url\(|@import|fetch\(", text), "it must not ask for another file"
    assert data["facts"]["schedule"] == "nested"
    assert len(data["memory"]["curves"]) == 4, "a class for each stage of the backbone"


def test_a_run_stands_beside_its_prediction(tmp_path):
    write_run(tmp_path, write_plan(tmp_path, 1))
    _, data = report(tmp_path, 1, "--no-search", "--run", str(tmp_path))
    assert data["run"]["losses"]["loss"] == [2.5, 2.25]
    worst_first = [abs(measured - predicted) for _, predicted, measured in data["run"]["lanes"]]
    assert worst_first == sorted(worst_first, reverse=True) and worst_first[0] > 0
    assert all(measured == pytest.approx(2 * predicted, rel=1e-4) for _, predicted, measured in data["run"]["lanes"])


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    plan = write_plan(tmp_path, 1)
    assert main(["report", str(plan), "--no-search", "--run", str(tmp_path), *machine(1)]) == 2
    assert "no timeline.json" in capsys.readouterr().err


def test_plans_of_the_search_are_points_and_this_one_is_among_them(tmp_path):
    _, data = report(tmp_path, 1, "search.max_tp=2", "search.time_budget_s=3")
    search = data["search"]
    points = [(size, seconds) for size, seconds, _ in search["points"]]
    front = [points[number] for number in search["front"]]
    assert front == sorted(front) and [s for _, s in front] == sorted((s for _, s in front), reverse=True)
    assert not any(a[0] <= b[0] and a[1] < b[1] for a in points for b in front), "something beats the front"
    assert "nested" in search["points"][search["plan"]][2]


@pytest.mark.parametrize(("limit_bytes", "front"), [(9.0, [0, 1]), (1.5, [0]), (0.5, [])])
def test_of_equal_plans_the_first_is_on_the_front_and_none_that_does_not_fit(limit_bytes, front):
    pairs = [(2.0, 1.0), (1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (1.0, 2.0)]
    assert pareto_front([Outcome(step_s=s, peak_bytes=b) for s, b in pairs], limit_bytes) == front


def test_no_name_ends_the_script():
    assert "</script>" not in encode({"name": "</script><script>alert(1)"})
    assert json.loads(encode({"name": "</script>"})) == {"name": "</script>"}


def browse(page: Path, script: str = "") -> str:
    """The page's document as a browser has it once it is drawn and `script` has run."""
    if script:
        page.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_browser
def test_a_browser_draws_every_section(tmp_path):
    write_run(tmp_path, write_plan(tmp_path, 1))
    out, data = report(tmp_path, 1, "--run", str(tmp_path), "search.max_tp=2", "search.time_budget_s=3")
    drawn = browse(out)
    assert "could not be drawn" not in drawn.split("<script")[0]
    sections = re.search(r'data-drawn="([^"]*)"', drawn)[1].split()
    assert {*sections} == data.keys() - {"title", "facts"} == {"rank_map", "gantt", "run", "memory", "search"}
    assert drawn.count("<canvas") >= 1 and drawn.count("<svg") >= 4, "the timeline, and the pictures"
    shown = drawn.split("<script")[0]
    assert "Of measured ranks a closed band" in shown and ">0 us<" not in shown and ">0 B<" not in shown
    assert "measured" not in browse(report(tmp_path, 1, "--no-search")[0]).split("<script")[0], "nothing was measured"


CLICK = """
const canvas = document.querySelector("div.scroll canvas"), box = canvas.getBoundingClientRect();
document.body.dataset.before = document.body.dataset.bands;
canvas.dispatchEvent(new MouseEvent("click", { clientX: box.left + 40, clientY: box.top + 10 }));
"""


@needs_browser
def test_ranks_of_the_same_lanes_are_one_band_until_it_is_clicked(tmp_path):
    out, data = report(tmp_path, 1, "--no-search")
    classes, groups = data["gantt"]["classes"], data["gantt"]["groups"]
    assert len({each["group"] for each in classes}) == len(data["rank_map"]["classes"]) == len(groups) - 1
    split = [each | {"name": f"ranks {i}"} for i, each in enumerate([classes[0]] * 30)] + classes[1:]
    text = out.read_text()
    start = text.index('"classes":', text.index('"gantt":'))
    before = json.dumps(classes, separators=(",", ":"), ensure_ascii=False)
    assert before in text[start:], "the page's own words"
    out.write_text(text.replace(before, json.dumps(split)))
    drawn = browse(out, CLICK)
    bands, opened = (int(re.search(rf'data-{name}="(\d+)"', drawn)[1]) for name in ("before", "bands"))
    assert (bands, opened) == (len(classes), len(classes) + 29)


@needs_browser
def test_small_cells_have_one_colour_for_each_combination(tmp_path):
    shown = browse(report(tmp_path, 1280, "--no-search")[0]).split("<script")[0]
    assert "vision + llm" in shown and "A colour for each combination" in shown
