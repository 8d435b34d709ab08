"""The example's model under three plans. Oracle: the losses of one process, which no layout may change."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

OWN = Path(__file__).resolve().parents[2] / "examples" / "own_model"
STEPS = 20
ONE = "{ranks: 0, layout: {dp: 1}}"
PLANS = {
    "as in the folder": (4, "{ranks: 0-2, layout: {dp: 3}, unit: 2}", "{ranks: 0-3, layout: {tp: 2, pp: 2}}"),
    "tokens split over tp": (
        2,
        "{ranks: 0-1, layout: {tp: 2}, sequence_parallel: true}",
        "{ranks: 0-1, layout: {tp: 2}, sequence_parallel: true}",
    ),
}


def train(directory: Path, world_size: int, sensor: str, llm: str) -> list[float]:
    """Losses of the first steps."""
    directory.mkdir()
    plan = directory / "plan.yaml"
    head = f"mosaic_plan: 1\nworkload: sensor_reader\nworld_size: {world_size}\nglobal_batch_size: 16\n"
    plan.write_text(f"{head}micro_batch_size: 4\nschedule: 1f1b\nmodules:\n  sensor: {sensor}\n  llm: {llm}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command += [str(OWN / "train.py"), "--mosaic-plan", str(plan), "--train-iters", str(STEPS), "--eval-iters", "0"]
    command += ["--mosaic-report", str(directory / "report")]
    environment = os.environ | {"PYTHONPATH": str(OWN.parents[1])}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (directory / "report" / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.dist
def test_it_learns_and_no_layout_changes_what(tmp_path):
    alone = train(tmp_path / "alone", 1, ONE, ONE)
    assert len(alone) == STEPS and alone[-1] < alone[0] and alone[-1] < math.log(8)
    for number, plan in enumerate(PLANS.values()):
        assert train(tmp_path / str(number), *plan) == pytest.approx(alone, rel=1e-5)
