"""Scripts in bf16: their images come in fp32, and the layers' weights are bf16. (Checks of parity run in fp32.)"""

from __future__ import annotations

import json

import pytest

from megatron_mosaic.launch.forked import run_forked
from tests.adapters import test_mimo
from tests.adapters.llava_cases import ARGUMENTS, SCRIPT, draw_images, needs_checkout
from tests.adapters.test_convert import prepare, run_planned

HEAD = "mosaic_plan: 1\nworld_size: 2\nglobal_batch_size: 8\nmicro_batch_size: 2\nschedule: 1f1b\n"
PLANS = {
    "llava": "  vision: {ranks: 0-1, layout: {tp: 2}}\n  llm: {ranks: 0-1, layout: {pp: 2}}\n",
    "mimo": "  images: {ranks: 0-1, layout: {pp: 2}}\n  drawings: {ranks: 1}\n  llm: {ranks: 0-1, layout: {tp: 2}}\n",
}


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("workload", PLANS)
def test_runs_in_bf16_near_fp32(workload, tmp_path, monkeypatch):
    prepare()
    draw_images(monkeypatch)
    script, words = (SCRIPT, ARGUMENTS) if workload == "llava" else (test_mimo.SCRIPT, test_mimo.ARGUMENTS)
    losses = {}
    for each in ("fp32", "bf16"):
        plan, report = tmp_path / f"{each}.yaml", tmp_path / each
        training = f"training: {{format: {each}}}\n"
        plan.write_text(f"{HEAD}workload: {workload}\n{training}modules:\n{PLANS[workload]}")
        given = (*words, "--train-iters", "2", "--mosaic-report", str(report), "--save", str(tmp_path / "saved" / each))
        run_forked(2, run_planned, script, given, str(plan))
        lines = (report / "losses.jsonl").read_text().splitlines()
        losses[each] = [next(v for k, v in json.loads(line).items() if "loss" in k) for line in lines]
    assert len(losses["fp32"]) == 2 and losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
