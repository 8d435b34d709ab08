"""The `mosaic` command: keys of --json, exit statuses, messages without tracebacks, and no torch in the planner."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mosaic.cli.main import COMMANDS, main, parse_arguments
from megatron_mosaic.cli.output import print_json
from megatron_mosaic.cli.train import render_losses
from megatron_mosaic.config import load_workload
from megatron_mosaic.cost_model.hardware.profile import save_profile
from megatron_mosaic.errors import RankFailure
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.training import Format, TrainingSetup
from megatron_mosaic.schedules import SCHEDULES
from tests.cases import make_profile
from tests.goldens import assert_golden

DIGITS = load_workload(["model=any2any-digits"])
VLM = ["model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=32"]


@pytest.fixture
def profile(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "profile.yaml"
    save_profile(make_profile(DIGITS), path)
    monkeypatch.setenv("MOSAIC_PROFILE", str(path))
    return path


@pytest.fixture
def plan(tmp_path) -> Path:
    modules = {"vision": ("0-1", Layout(dp=2)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("2-3", Layout(dp=2))}
    path = tmp_path / "plan.yaml"
    save_plan(
        Plan(
            workload=DIGITS.name,
            digest=DIGITS.digest,
            world_size=4,
            global_batch_size=8,
            micro_batch_size=2,
            schedule=ScheduleChoice("1f1b"),
            modules={n: ModulePlan(ranks=RankSet.parse(r), layout=x) for n, (r, x) in modules.items()},
            cluster=FrozenMap({"kind": "local", "num_ranks": 4, "profile": make_profile(DIGITS).title}),
            training=TrainingSetup(format=Format.fp32),
        ),
        path,
    )
    return path


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(list(map(str, words)))
    out, err = capsys.readouterr()
    lines = [
        line for line in err.splitlines(keepends=True) if not line.startswith("mosaic: progress: ")
    ]  # if it is slow
    return status, out, "".join(lines)


def run_json(capsys, *words) -> dict:
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    assert err == ""
    return json.loads(out)


def test_plan(capsys, profile, tmp_path):
    out = tmp_path / "out.yaml"
    result = run_json(capsys, "plan", "model=any2any-digits", "--out", out, "cluster=local", "search.max_tp=2")
    assert set(result) >= {"plan", "predicted", "steps", "search_s", "evaluated"}
    assert set(result["predicted"]) >= {"step_s", "bubble_frac", "peak_bytes", "samples_per_s"}
    assert result["fits"] is True
    assert set(result["steps"][0]) >= {"step_s", "reason"}
    written = load_plan(out)
    assert written.digest == DIGITS.digest
    assert written.predicted is not None
    assert written.predicted.step_s == result["predicted"]["step_s"] == min(s["step_s"] for s in result["steps"])
    assert result["plan"]["modules"].keys() == {"vision", "llm", "generator"}
    assert all(m.layout.tp <= 2 for m in written.modules.values())
    assert run(capsys, "show", out)[0] == 0
    simulated = run_json(capsys, "simulate", out)
    assert simulated["step_s"] == pytest.approx(result["predicted"]["step_s"])


def test_plan_for_people(capsys, tmp_path):
    status, out, _ = run(capsys, "plan", *VLM)
    assert status == 0
    assert "start: best " in out
    assert "mosaic_plan: 1" in out
    status, out, _ = run(capsys, "plan", *VLM, "--out", tmp_path / "p.yaml")
    assert "plan written to" in out
    assert "mosaic_plan" not in out


def test_compare(capsys):
    rows = run_json(capsys, "compare", *VLM)["rows"]
    assert rows[0]["name"] == "mosaic"
    for row in rows:
        assert set(row) >= {"name", "step_s", "peak_bytes", "feasible", "speedup"}
    by_name = {row["name"]: row for row in rows}
    assert by_name["homogeneous"]["speedup"] == 1.0
    assert by_name["mosaic"]["speedup"] == pytest.approx(by_name["homogeneous"]["step_s"] / by_name["mosaic"]["step_s"])
    assert by_name["mosaic"]["step_s"] <= min(by_name[name]["step_s"] for name in ("homogeneous", "disaggregated"))
    for name in SCHEDULES:
        row = by_name[f"schedule {name}"]
        assert row["step_s"] > 0 and 0 < row["bubble_frac"] < 1 and row["peak_bytes"] > 0
        assert row["fits"] == (row["peak_bytes"] <= 0.9 * 80e9)
    status, out, _ = run(capsys, "compare", *VLM)
    assert status == 0
    assert "homogeneous" in out


def test_show(capsys, plan):
    result = run_json(capsys, "show", plan)
    assert set(result) >= {"modules", "rank_map", "schedule", "groups", "peak_bytes", "cluster", "training"}
    assert result["precision"] == result["training"]["format"] == "fp32"
    assert set(result["peak_bytes"]) == {"0", "2"}  # the first of each class of alike ranks
    assert 0 < result["groups"]["created"] < result["groups"]["asked"]
    assert result["rank_map"] == {"0-1": ["vision", "llm"], "2-3": ["llm", "generator"]}
    assert result["modules"]["llm"]["layout"]["tp"] == 2
    assert result["schedule"].startswith("schedule 1f1b microbatches=4")
    status, out, _ = run(capsys, "show", plan)
    assert status == 0
    assert_golden("show", "".join(line.rstrip() + "\n" for line in out.splitlines()))


def test_simulate(capsys, plan, profile, tmp_path):
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    result = run_json(capsys, "simulate", plan, "--trace", trace, "--html", page)
    assert set(result) >= {"step_s", "bubble_frac", "peak_bytes", "by_module", "fits"}
    assert max(sum(held.values()) for held in result["memory"].values()) == pytest.approx(result["peak_bytes"])
    assert set(result["by_module"]) >= {"vision", "llm", "generator"}
    assert 0 < result["bubble_frac"] < 1
    assert {e["ph"] for e in json.loads(trace.read_text())["traceEvents"]} == {*"MXCsf"}
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    rows = [row for each in drawn["gantt"]["classes"] for row in each["predicted"]]
    spans = sum(len(row["spans"]) // 3 for row in rows)
    assert spans == 2 * (2 * 4 * 2 + 2)  # two kinds of ranks: two lanes with F and B of four units, and two tails
    assert drawn.keys() == {"title", "facts", "rank_map", "gantt", "memory"}
    status, out, _ = run(capsys, "simulate", plan)
    assert status == 0
    assert "ranks 0-1 vision.0" in out


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["plan", "cluster=b200"], "override 'cluster=b200'"),
        (["plan", "+search.max_tq=1", "cluster=h100_1x8"], "search.max_tq"),
        (["plan", "cluster=local"], "profile.yaml"),
        (["plan", "~model=3"], "override '~model=3'"),
        (["compare", "model=/path/x"], "/path/x"),
        (["simulate", "/dev/zero"], "/dev/zero"),
        (["show", "."], "."),
        (["plan", "--frob"], "mosaic: arguments"),
        (["plan", *VLM, "--out", "missing/plan.yaml"], "missing/plan.yaml"),
        (["plan", "model=any2any-tasks", "cluster=a800_8x8", "--predicted", "p.json"], "--predicted"),
        (["show"], "mosaic show: arguments"),
        (["show", "missing.yaml"], "missing.yaml"),
        (["simulate", "missing.yaml"], "missing.yaml"),
        (["fly"], "mosaic: arguments"),
        ([], "mosaic: arguments"),
    ],
)
def test_wrong_input(capsys, words, where, monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    assert where in err.splitlines()[0]
    assert all(part in err for part in ("got:", "expected:", "fix:"))
    assert "Traceback" not in err
    status, out, _ = run(capsys, *words, "--json")
    assert status == 2
    assert set(json.loads(out)) == {"error", "where", "got", "expected", "fix"}


def test_no_feasible_plan_is_an_answer(capsys):
    status, out, err = run(capsys, "plan", *VLM, "search.memory_frac=0.01", "--json")
    assert status == 1
    assert json.loads(out)["error"] == "NoFeasiblePlan"
    assert "search: memory" in err


def test_a_plan_for_another_model_is_refused(capsys, plan, profile):
    text = plan.read_text().replace(DIGITS.digest, "f" * 12)
    plan.write_text(text)
    status, _, err = run(capsys, "simulate", plan)
    assert status == 2
    assert err.startswith("mosaic: digest")
    assert run(capsys, "show", plan)[0] == 2


def test_unbuilt_schedule_is_refused_by_name(capsys, plan, profile):
    plan.write_text(plan.read_text().replace("schedule: 1f1b", "schedule: waves"))
    for command in ("show", "simulate"):
        status, _, err = run(capsys, command, plan)
        assert status == 2
        assert "waves (a name of the plan format that is not built yet)" in err


def test_a_failed_rank_is_an_answer(capsys, monkeypatch):
    def fail(_):
        raise RankFailure("rank 3", got="killed", expected="exit status 0", fix="see its log")

    monkeypatch.setattr("megatron_mosaic.cli.show.main", fail)
    status, _, err = run(capsys, "show", "plan.yaml")
    assert status == 1
    assert err.startswith("mosaic: rank 3")


def test_train_hands_unknown_words_on(monkeypatch):
    arguments = parse_arguments(["train", "plan.yaml", "--train-iters", "5", "--json", "--lr", "1e-3"])
    assert arguments.megatron_args == ["--train-iters", "5", "--lr", "1e-3"]
    assert arguments.json
    assert arguments.plan == "plan.yaml"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--train-iters", "0"], "--train-iters"),
        (["--train-iters=-1"], "--train-iters"),
        (["--train-iters", "many"], "--train-iters"),
        (["--train-samples", "0"], "--train-samples"),
        (["--skip-train"], "--skip-train"),
        (["--num-layers", "abc"], "--num-layers"),
        (["--num-layers"], "--num-layers"),
        (["--digits-seed", "x"], "--digits-seed"),
        (["--bf16"], "--bf16"),
        (["--use-distributed-optimizer"], "--use-distributed-optimizer"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--hidden-drop", "0.1"], "--hidden-drop"),
        (["--optimizer=muon"], "--optimizer"),
        (["--fp16"], "--fp16"),
        (["--window-size", "(2, 0)"], "--window-size"),
        (["--pipeline-model-parallel-size", "4"], "--pipeline-model-parallel-size"),
        (["--mosaic-plan", "other.yaml"], "--mosaic-plan"),
        (["--rotary-base", "500"], "--rotary-base"),
        (["stray"], "stray"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_words_are_refused_before_any_process_starts(capsys, plan, monkeypatch, command, words, where):
    monkeypatch.setattr("megatron_mosaic.cli.train.run_torchrun", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("megatron_mosaic.cli.check.import_runtime", lambda: pytest.fail("started"))
    status, out, err = run(capsys, command, plan, *words, "--json")
    assert status == 2
    assert set(json.loads(out)) == {"error", "where", "got", "expected", "fix"}
    assert json.loads(out)["where"] == where
    assert "usage" not in err


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_wrong_plan_file_is_named_before_a_wrong_flag(capsys, plan, monkeypatch, tmp_path, command):
    monkeypatch.setattr("megatron_mosaic.cli.train.run_torchrun", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("megatron_mosaic.cli.check.import_runtime", lambda: pytest.fail("started"))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bomb.yaml").write_text("a: &a {b: *a}\n")
    plan.write_text(plan.read_text().replace("world_size: 4", "world_size: 3"))
    for name, where in (("fifo", "fifo"), ("bomb.yaml", "bomb.yaml:1"), ("plan.yaml", "plan.yaml: modules.llm.ranks")):
        status, out, err = run(capsys, command, tmp_path / name, "--num-layers", "abc", "--frob", "--json")
        assert status == 2, err
        assert json.loads(out)["error"] == "PlanError"
        assert json.loads(out)["where"] == str(tmp_path / where)


def train(monkeypatch, losses):
    """Stands in for torchrun: writes the report of a run with these losses."""

    def pretend(world_size, words, **_):
        directory = Path(words[words.index("--mosaic-report") + 1])
        (directory / "losses.jsonl").write_text("".join(json.dumps(step) + "\n" for step in losses))
        spans = [[rank, "llm.0", 0.0, 1.0, "llm.0F0"] for rank in range(world_size)]
        if losses:
            (directory / "timeline.json").write_text(json.dumps({"spans": spans, "step_s": 1.0, "seconds": [1.0]}))

    monkeypatch.setattr("megatron_mosaic.cli.train.run_torchrun", pretend)


def test_losses_that_are_no_numbers_are_null(capsys, plan, profile, monkeypatch):
    train(monkeypatch, [{"loss": 2.0}, {"loss": math.nan}, {"loss": math.inf}])
    assert run_json(capsys, "train", plan)["losses"] == [2.0, None, None]
    status, out, _ = run(capsys, "train", plan)
    assert status == 0
    assert "nan" in out


def test_a_run_without_a_step_is_wrong_input(capsys, plan, profile, monkeypatch):
    train(monkeypatch, [])
    status, _, err = run(capsys, "train", plan)
    assert status == 2
    assert "no training step" in err


@pytest.mark.parametrize(("words", "goes_on"), [((), False), (("--load", "checkpoints"), True)])
def test_timelines_of_an_earlier_run_stay_only_where_it_goes_on(
    capsys, plan, profile, monkeypatch, tmp_path, words, goes_on
):
    """Of another plan: `calibrate --from-run` would fit to both."""
    earlier = tmp_path / "report" / "timelines" / "0123456789ab" / "plan.yaml"
    earlier.parent.mkdir(parents=True)
    earlier.write_text(plan.read_text())
    train(monkeypatch, [{"loss": 2.0}])
    status, _, err = run(capsys, "train", plan, "--report", tmp_path / "report", *words)
    assert status == 0, err
    assert earlier.exists() == goes_on


def test_what_has_no_effect_and_what_is_not_priced_is_said(capsys, plan, profile, monkeypatch):
    train(monkeypatch, [{"loss": 2.0}])
    status, out, err = run(capsys, "train", plan, "--data-path", "text", "--swiglu", "--json")
    assert status == 0 and "predicted" not in json.loads(out)
    notes = err.splitlines()
    assert notes[0].startswith("mosaic: note: --data-path has no effect here")
    assert notes[1] == "mosaic: note: no prediction: the cost model knows nothing of --swiglu"


def test_train_predicts_the_model_that_runs(capsys, plan, profile, monkeypatch):
    train(monkeypatch, [{"loss": 2.0}])
    assert run_json(capsys, "train", plan)["predicted"]["step_s"] > 0
    plan.write_text("\n".join(line for line in plan.read_text().splitlines() if not line.startswith("digest")))
    status, out, err = run(capsys, "train", plan, "--num-layers", "8", "--json")
    assert status == 0
    assert "predicted" not in json.loads(out)
    assert err.count("\n") == 1
    assert err.startswith("mosaic: note: no prediction:")
    status, _, err = run(capsys, "train", plan, "--num-layers", "8", "--profile", profile)
    assert status == 2
    assert "digest" in err


@pytest.mark.parametrize("text", ["[1", "mosaic_profile: 1"])
def test_a_corrupt_default_profile_does_not_refuse_training(capsys, plan, profile, monkeypatch, text):
    profile.write_text(text)
    train(monkeypatch, [{"loss": 2.0}])
    status, out, err = run(capsys, "train", plan, "--json")
    assert status == 0
    assert "predicted" not in json.loads(out)
    assert err.count("\n") == 1
    assert err.startswith("mosaic: note: no prediction:")
    assert run(capsys, "train", plan, "--profile", profile)[0] == 2


def test_json_has_no_infinite_numbers(capsys):
    print_json({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": (-math.inf, "x", True, 3)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [None, "x", True, 3]}}


def test_a_loss_curve_that_ends_in_nan():
    lines = render_losses([{"loss": 2.0}, {"loss": 1.0}, {"loss": math.inf}, {"loss": math.nan}]).splitlines()
    assert [line.count("#") for line in lines] == [0, 50, 25, 0, 0]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_planner_starts_without_torch():
    code = (
        "import sys; from megatron_mosaic.cli import main; status = main(sys.argv[1:]);"
        "print(*sorted({'torch', 'megatron', 'scipy'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan", *VLM, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted"]["step_s"] > 0
    assert done.stderr.splitlines()[-1] == ""  # names of modules; before it progress, where it took long


def test_names_of_a_config_dir(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").touch()
    words = ["plan", "model=mine", "cluster=h100_8x8", "--config-dir", str(tmp_path)]
    assert parse_arguments(words).overrides == [f"model={tmp_path}/model/mine.yaml", "cluster=h100_8x8"]
