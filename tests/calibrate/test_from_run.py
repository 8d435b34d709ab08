"""A profile corrected by a run: the run is simulated under a profile that the command does not know, and must find."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mosaic.cli.main import main
from megatron_mosaic.config import load_task, load_workload
from megatron_mosaic.cost_model.hardware.profile import Profile, load_profile, save_profile
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Layout, Plan
from megatron_mosaic.runtime.telemetry.timelines import TimelineWriter, alike_ranks
from megatron_mosaic.schedules.timeline import Span, Timeline
from megatron_mosaic.search.find import find_plan
from tests.cases import make_plan, make_profile

WORDS = ("model=any2any-digits", "cluster=local", "cluster.num_ranks=2", "workload.global_batch_size=16")
# (module, field) -> how much longer it takes than the profile says
TRUTH = {
    ("vision", "forward_s"): 1.7,
    ("vision", "backward_s"): 0.6,
    ("llm", "forward_s"): 1.2,
    ("llm", "backward_s"): 2.5,
    ("generator", "forward_s"): 0.4,
    ("generator", "backward_s"): 1.0,
}
OPTIMIZER, SAMPLE_S = 3.0, 2e-3
LAYOUTS = {
    "apart": {"vision": ("0", Layout()), "llm": ("1", Layout()), "generator": ("0", Layout())},
    "alike": {name: ("0-1", Layout(dp=2)) for name in ("vision", "llm", "generator")},
    "tp": {name: ("0-1", Layout(tp=2)) for name in ("vision", "llm", "generator")},
    "pp": {"vision": ("0-1", Layout(dp=2)), "llm": ("0-1", Layout(pp=2)), "generator": ("1", Layout())},
}


@pytest.fixture
def profiles(tmp_path) -> tuple[Path, Profile]:
    """The file that the user has, and the profile of the machine as it really is."""
    known = make_profile(load_workload(WORDS))
    save_profile(known, tmp_path / "known.yaml")
    data = known.model_dump(mode="json")
    for module, by_tp in data["modules"].items():
        for points in (points for by_threads in by_tp.values() for points in by_threads.values()):
            for point in points:
                for field in ("forward_s", "backward_s"):
                    point[field] *= TRUTH[module, field]
    for point in data["optimizer"]:
        point["seconds"] *= OPTIMIZER
    data["overheads"]["sample_s"] = SAMPLE_S  # which the other does not know
    return tmp_path / "known.yaml", Profile.model_validate(data)


def make_run(directory: Path, known: Path, truth: Profile, layout: str) -> tuple[Plan, Timeline]:
    """Timelines of a run under the true profile: the plan, and what it really takes."""
    task = load_task(WORDS, profile_path=known)
    modules = LAYOUTS[layout]
    plan = task.complete(
        make_plan(modules, workload=task.workload, world_size=2, global_batch_size=16, micro_batch_size=2)
    )
    timeline = simulate(plan, replace(task, profile=truth).cost_model()).timeline()
    for rank in alike_ranks(plan):
        writer = TimelineWriter(directory, plan, rank)
        spans = [span for span in timeline.spans if span.rank == rank]
        for step, factor in ((10, 1.0), (20, 5.0), (30, 1.0)):  # one of them was disturbed
            moved = [Span(s.rank, s.lane, s.start_s * factor, s.end_s * factor, s.label) for s in spans]
            writer.write(step, timeline.end_s * factor, moved, since=2)
    return plan, timeline


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_corrected_profile_is_the_machine_as_it_is(tmp_path, capsys, profiles, layout) -> None:
    known, truth = profiles
    plan, timeline = make_run(tmp_path / "report", known, truth, layout)
    out = tmp_path / "corrected.yaml"
    assert main(["calibrate", "--from-run", str(tmp_path), "--profile", str(known), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    factors = {f"{module} {field.removesuffix('_s')}": factor for (module, field), factor in TRUTH.items()}
    if layout != "tp":  # there, actions also communicate, which one factor corrects with the rest
        loading = said["factors"].pop("loading")
        assert said["factors"] == pytest.approx(factors | {"optimizer": OPTIMIZER}, rel=0.01)
        assert load_profile(out).overheads.sample_s == pytest.approx(SAMPLE_S, rel=0.01) and loading > 0
    (step,) = said["steps"]
    assert step["after_s"] == pytest.approx(timeline.end_s, rel=0.01)
    assert step["measured_s"] == pytest.approx(timeline.end_s, rel=1e-3)
    assert abs(step["before_s"] / timeline.end_s - 1) > 0.1, "else there was nothing to correct"
    task = load_task(WORDS, profile_path=out)
    assert simulate(plan, task.cost_model()).timeline().end_s == pytest.approx(timeline.end_s, rel=0.01)
    assert "corrected by a run" in load_profile(out).title


def test_planning_goes_on_with_it(tmp_path, capsys, profiles) -> None:
    known, truth = profiles
    make_run(tmp_path / "report", known, truth, "alike")
    out = str(tmp_path / "corrected.yaml")
    assert main(["calibrate", "--from-run", str(tmp_path / "report"), "--profile", str(known), "--out", out]) == 0
    assert "predicted" in capsys.readouterr().out
    assert main(["plan", *WORDS, "--profile", out, "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]["step_s"]
    best = simulate_best(truth, known)
    assert predicted == pytest.approx(best, rel=0.01)


def simulate_best(truth: Profile, known: Path) -> float:
    """The step of the plan that a search finds for the machine as it is."""
    task = replace(load_task(WORDS, profile_path=known), profile=truth)
    return find_plan(task.cost_model(), task.search).simulation.step_s


def test_what_cannot_correct_is_refused(tmp_path, capsys, profiles) -> None:
    known, truth = profiles
    command = ["calibrate", "--from-run", str(tmp_path / "report"), "--profile", str(known), "--out", "x.yaml"]
    assert main(command) == 2
    assert "no timelines" in capsys.readouterr().err
    make_run(tmp_path / "report", known, truth, "apart")
    assert main([*command, "cluster=h100_1x8"]) == 2
    assert "a run of a plan for h100_1x8" in capsys.readouterr().err
    assert main([*command, "--gpu-type", "h100_sxm"]) == 2
    (file,) = (tmp_path / "report").glob("timelines/*/rank-00001.jsonl")
    file.unlink()
    assert main(command) == 2
    assert "none of ranks [1]" in capsys.readouterr().err


def test_a_run_of_another_machine_is_refused(tmp_path, capsys, profiles) -> None:
    """A hundred times slower: the wrong profile."""
    known, truth = profiles
    data = truth.model_dump(mode="json")
    for points in (points for threads in data["modules"]["llm"].values() for points in threads.values()):
        for point in points:
            point["forward_s"] *= 100
    make_run(tmp_path / "report", known, Profile.model_validate(data), "apart")
    assert main(["calibrate", "--from-run", str(tmp_path), "--profile", str(known), "--out", "x.yaml"]) == 2
    assert "forward of llm" in capsys.readouterr().err


def test_a_loader_that_is_much_slower_is_no_other_machine(tmp_path, capsys, profiles) -> None:
    """Two hundred times: the data lie elsewhere."""
    known, truth = profiles
    few = load_profile(known)
    save_profile(
        few.model_copy(update={"overheads": few.overheads.model_copy(update={"sample_s": SAMPLE_S / 200})}), known
    )
    make_run(tmp_path / "report", known, truth, "apart")
    out = tmp_path / "corrected.yaml"
    assert main(["calibrate", "--from-run", str(tmp_path), "--profile", str(known), "--out", str(out)]) == 0
    assert load_profile(out).overheads.sample_s == pytest.approx(SAMPLE_S, rel=0.01)
    assert "do not agree" not in capsys.readouterr().err


def test_what_no_correction_brings_together_is_said(tmp_path, capsys, profiles, monkeypatch) -> None:
    known, truth = profiles
    make_run(tmp_path / "report", known, truth, "apart")
    monkeypatch.setattr("megatron_mosaic.calibrate.from_run._MOST_ROUNDS", 0)
    words = ["--profile", str(known), "--out", str(tmp_path / "corrected.yaml")]
    assert main(["calibrate", "--from-run", str(tmp_path), *words, "--json"]) == 0
    said = capsys.readouterr()
    assert "llm backward took 2.5 times as long" in said.err
    assert json.loads(said.out)["apart"]["llm backward"] == pytest.approx(2.5, rel=0.01)
