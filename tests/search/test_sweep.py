"""The planner as a Hydra app, run as a user does, and its table: against the planner called in this process."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mosaic.config import load_task
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.search.find import find_plan
from megatron_mosaic.search.sweep import draw, read_rows, render_table, write_table

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("model=vlm_7b", "cluster=h100_1x8", "search.max_tp=1", "workload.global_batch_size=64")


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_mosaic.search", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


def test_a_sweep_is_one_table_and_a_point_without_a_plan_is_infinite(tmp_path) -> None:
    done = run(tmp_path, "-m", *WORDS, "search.memory_frac=0.9,0.01", "hydra.sweep.dir=swept")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "swept" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = find_plan((task := load_task(WORDS)).cost_model(), task.search)
    assert [(row["point"], row["search.memory_frac"]) for row in rows] == [("0", "0.9"), ("1", "0.01")]
    assert float(rows[0]["step_s"]) == expected.simulation.step_s and rows[0]["error"] == ""
    assert math.isinf(float(rows[1]["step_s"])) and "memory" in rows[1]["error"]
    assert load_plan(tmp_path / "swept" / "0" / "plan.yaml") == task.complete(expected.plan)
    table = done.stdout[done.stdout.index("point ") : done.stdout.index("table ")].splitlines()
    assert "search.memory_frac" in table[0] and "inf" in table[-1].split()


def test_the_users_own_files_join_by_config_dir_and_wrong_keys_are_refused(tmp_path) -> None:
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    shipped = ROOT / "megatron_mosaic" / "conf" / "cluster" / "h100_1x8.yaml"
    (tmp_path / "mine" / "cluster" / "own.yaml").write_text(shipped.read_text().replace("num_nodes: 1", "num_nodes: 3"))
    shown = run(tmp_path, "--config-dir", "mine", "cluster=own", "train.lr=3e-4", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "num_nodes: 3" in shown.stdout and "lr: 0.0003" in shown.stdout
    refused = run(tmp_path, "train.nonsense=1", "--cfg", "job")
    assert refused.returncode != 0 and "nonsense" in refused.stderr


def test_a_single_point_ends_with_the_status_of_its_answer(tmp_path) -> None:
    for word, status, said in (
        ("search.algorithm=lucky", 2, "greedy or exhaustive"),
        ("search.memory_frac=0.01", 1, "memory"),
        ("+search.pin.llm.layout.tp=2", 1, "within the pins"),  # and WORDS allow tp 1 only
    ):
        done = run(tmp_path, *WORDS, word, "hydra.run.dir=one")
        assert done.returncode == status and "Traceback" not in done.stderr
        assert said in done.stdout
        assert said in json.loads((tmp_path / "one" / "result.json").read_text())["error"]


def test_the_picture_names_points_by_what_differs(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"point": str(i), "a.b": i, "c": "same", "step_s": math.inf if i else 2.0, "error": ""} for i in range(2)]
    columns = write_table(rows, tmp_path / "sweep.csv")
    assert draw(rows, columns, tmp_path / "sweep.svg")
    drawn = re.findall(r"<!-- (.*?) -->", (tmp_path / "sweep.svg").read_text())
    assert {"0: b=0", "1: b=1", "c=same", "no feasible plan"} <= {text.strip() for text in drawn}
    assert not draw(rows[1:], columns, tmp_path / "none.svg") and not (tmp_path / "none.svg").exists()


def test_points_keep_the_order_of_their_numbers(tmp_path) -> None:
    for number in (10, 9, 2):
        (tmp_path / str(number)).mkdir()
        text = f'{{"overrides": ["+a.b={number}"], "step_s": {"Infinity" if number == 9 else number}, "error": ""}}'
        (tmp_path / str(number) / "result.json").write_text(text)
    rows = read_rows(tmp_path)
    assert [(row["point"], row["a.b"]) for row in rows] == [("2", "2"), ("9", "9"), ("10", "10")]
    columns = write_table(rows, tmp_path / "sweep.csv")
    assert columns[:3] == ["point", "a.b", "step_s"]
    assert render_table(rows, columns).splitlines()[2].split() == ["9", "9", "inf"]
