"""A plan says all that a number depends on: every command reads it there, the command line wins and says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_mosaic.cli.main import main
from megatron_mosaic.cli.planned import apply_overrides
from megatron_mosaic.cli.show import all_classes
from megatron_mosaic.config import load_task, load_workload
from megatron_mosaic.cost_model.hardware.profile import save_profile
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import format_plan, load_plan, parse_plan, save_plan
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from tests.cases import make_profile

VLM = load_workload(["model=vlm_7b"])
DIGITS = load_workload(["model=any2any-digits"])
TRAINED = TrainingSetup(sharding=Sharding.optimizer, gradient_overlap_frac=0.9)
EVERYWHERE = {
    "vision": ModulePlan(ranks=RankSet.block(0, 8), layout=Layout(dp=8)),
    "llm": ModulePlan(ranks=RankSet.block(0, 8), layout=Layout(tp=4, dp=2)),
}
PLAN = Plan(
    workload=VLM.name,
    digest=VLM.digest,
    world_size=8,
    global_batch_size=16,
    micro_batch_size=1,
    schedule=ScheduleChoice("1f1b"),
    modules=EVERYWHERE,
    cluster="h100_1x8",
    training=TRAINED,
)
GPU_FILE = "gpu_type: 1\nbase: h100_sxm\nbandwidth_frac: 0.87\nsources: {bandwidth_frac: \"a 'copy', ${x}\"}\n"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No profile of the machine that runs the tests."""
    monkeypatch.delenv("MOSAIC_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def profile(tmp_path, monkeypatch) -> str:
    save_profile(make_profile(DIGITS), tmp_path / "profile.yaml")
    monkeypatch.setenv("MOSAIC_PROFILE", str(tmp_path / "profile.yaml"))
    return str(tmp_path / "profile.yaml")


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(list(map(str, words)))
    return status, *capsys.readouterr()


def answer(capsys, *words, status=0) -> tuple[dict, list[str]]:
    """(JSON object, notes)."""
    got, out, err = run(capsys, *words, "--json")
    assert got == status, err
    return json.loads(out), [line.removeprefix("mosaic: note: ") for line in err.splitlines()]


def written(plan: Plan, name: str = "plan.yaml") -> str:
    save_plan(plan, name)
    return name


# -- one file, one answer -----------------------------------------------------------------------------------------


def test_a_plan_for_gpus_is_simulated_and_shown_without_a_word(capsys):
    plan = written(PLAN)
    simulated, notes = answer(capsys, "simulate", plan)
    assert notes == []
    shown, notes = answer(capsys, "show", plan)
    assert notes == []
    assert max(shown["peak_bytes"].values()) == simulated["peak_bytes"]
    assert (shown["cluster"], shown["training"]["sharding"], shown["precision"]) == ("h100_1x8", "optimizer", "bf16")
    words = ["model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=16"]
    words += ["workload.training.sharding=optimizer", "workload.training.gradient_overlap_frac=0.9"]
    assert load_task(words).cost_model().source.setup == TRAINED  # what the numbers are compared with
    assert answer(capsys, "simulate", written(replace(PLAN, cluster="", training=None)), *words)[0] == simulated


def test_memory_does_not_depend_on_what_was_predicted(capsys):
    """It was 64 GB with `predicted` and 168 GB without."""
    status, out, _ = run(capsys, "plan", "model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=32", "--json")
    assert status == 0
    made = json.loads(out)["plan"]
    peaks = []
    for keys in (made, {key: value for key, value in made.items() if key != "predicted"}):
        Path("made.yaml").write_text(yaml.safe_dump(keys))
        peaks.append(answer(capsys, "show", "made.yaml")[0]["peak_bytes"])
    assert peaks[0] == peaks[1]
    assert max(peaks[0].values()) == made["predicted"]["peak_bytes"]


@pytest.mark.parametrize(
    ("training", "larger"),
    [(replace(TRAINED, format=Format.fp32), True), (replace(TRAINED, sharding=Sharding.none), True), (TRAINED, False)],
)
def test_memory_is_by_the_plans_format_and_sharding(capsys, training, larger):
    peaks = [
        max(answer(capsys, "show", written(replace(PLAN, training=each)))[0]["peak_bytes"].values())
        for each in (TRAINED, training)
    ]
    assert (peaks[1] > 1.2 * peaks[0]) is larger
    assert larger or peaks[0] == peaks[1]


# -- what `mosaic plan` writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=h100_1x8"], "h100_1x8"),
        (["cluster=h100_1x8", "cluster.num_nodes=1"], "h100_1x8"),  # an override that changes nothing
        (["cluster=h100_8x8", "cluster.num_nodes=2"], {"name": "h100_8x8", "num_nodes": 2, "gpu": "h100_sxm"}),
        (["cluster=h100_1x8", "cluster.inter.latency_s=1e-5"], {"name": "h100_1x8", "kind": "gpu"}),
    ],
)
def test_the_cluster_is_a_name_or_all_its_values(words, said):
    plan = load_task(["model=vlm_7b", *words]).complete(replace(PLAN, cluster="", training=None))
    assert plan.training == TrainingSetup()
    assert parse_plan(format_plan(plan)) == plan
    if isinstance(said, str):
        assert plan.cluster == said
    else:
        assert {key: plan.cluster[key] for key in said} == said
        assert set(plan.cluster["inter"]) == {"name", "bytes_per_s", "latency_s", "source"}


def test_the_constants_of_a_gpu_file_travel_in_the_plan(capsys):
    Path("mine.yaml").write_text(GPU_FILE)
    words = ["model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=16"]
    made, _ = answer(capsys, "plan", *words, "cluster.gpu=mine.yaml", "--out", "out.yaml")
    Path("mine.yaml").unlink()
    simulated, notes = answer(capsys, "simulate", "out.yaml")
    assert notes == []
    assert simulated["step_s"] == made["predicted"]["step_s"]
    assert load_plan("out.yaml").cluster["gpu"]["sources"] == {"bandwidth_frac": "a 'copy', ${x}"}
    plain, notes = answer(capsys, "simulate", "out.yaml", "cluster.gpu=h100_sxm")
    assert notes == ["cluster.gpu=h100_sxm: the plan says mine.yaml"]
    assert plain["step_s"] != simulated["step_s"]


def test_a_plan_of_this_machine_records_its_profile(capsys, profile):
    _, out, _ = run(capsys, "plan", "model=any2any-digits", "--out", "out.yaml", "--json")
    assert json.loads(out)["plan"]["training"]["format"] == "fp32"
    plan = load_plan("out.yaml")
    title = make_profile(DIGITS).title
    assert dict(plan.cluster) == {"kind": "local", "num_ranks": 4, "profile": title}
    assert plan.training == TrainingSetup(format=Format.fp32)
    assert answer(capsys, "simulate", "out.yaml")[1] == []
    save_plan(replace(plan, cluster={**plan.cluster, "profile": "profile of another"}), "other.yaml")
    _, notes = answer(capsys, "simulate", "other.yaml")
    assert notes == [f"the plan was made with the profile of another, and this is predicted with the {title}"]


# -- the command line wins, and says so ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        (["search.max_tp=2", "search.memory_frac=1"], []),
        (["workload.training.format=bf16", "cluster.num_nodes=1", "cluster=h100_1x8"], []),
        (["+workload.items_per_sample.vision=3"], []),
        (["cluster=h100_8x8"], ["cluster=h100_8x8: the plan says h100_1x8"]),
        (["cluster.num_nodes=4"], ["cluster.num_nodes=4: the plan says 1"]),
        (
            ["workload.training.format=fp8", "workload.training.sharding=none"],
            [
                "workload.training.format=fp8: the plan says bf16",
                "workload.training.sharding=none: the plan says optimizer",
            ],
        ),
        (["workload.global_batch_size=32"], ["workload.global_batch_size=32: the plan says 16"]),
        (["++cluster.inter.latency_s=1e-3"], ["++cluster.inter.latency_s=1e-3: the plan says 1.4e-05"]),
    ],
)
def test_each_override_that_changes_the_plan_is_named(capsys, words, notes):
    plan = written(PLAN)
    assert answer(capsys, "show", plan, *words)[1] == notes


def test_the_command_line_wins():
    planned = apply_overrides(
        PLAN, ["workload.global_batch_size=32", "workload.training.format=fp8", "cluster.num_nodes=2"]
    )
    assert planned.plan.global_batch_size == 32
    assert planned.plan.training == replace(TRAINED, format=Format.fp8)  # the others stay the plan's
    assert planned.build_task(None).cluster.num_ranks == 16
    assert apply_overrides(PLAN, []).plan == PLAN


def test_a_cluster_without_enough_ranks_is_refused_by_name(capsys):
    plan = written(PLAN)
    for command in ("simulate", "show"):
        status, _, err = run(capsys, command, plan, "cluster.gpus_per_node=4")
        assert status == 2
        assert "at most the 4 ranks of cluster 'h100_1x8'" in err
        assert "cluster.num_nodes" in err


def test_a_rank_that_is_too_full_is_an_answer(capsys):
    plan = written(PLAN)
    full, _ = answer(capsys, "simulate", plan, "search.memory_frac=0.1", status=1)
    roomy, _ = answer(capsys, "simulate", plan)
    assert (full["fits"], roomy["fits"]) == (False, True)
    assert full | {"fits": True} == roomy
    status, out, _ = run(capsys, "simulate", plan, "search.memory_frac=0.1")
    assert status == 1
    assert " vision.0" in out
    assert "does not fit: 8.00 GB" in out


# -- plans of before ----------------------------------------------------------------------------------------------


def test_a_plan_that_says_neither_takes_both_from_the_command_line(capsys):
    plan = written(replace(PLAN, cluster="", training=None))
    for words, where in (([], "cluster"), (["cluster=h100_1x8"], "training")):
        error, _ = answer(capsys, "simulate", plan, *words, status=2)
        assert error["where"] == where
        assert all(error[part] for part in ("got", "expected", "fix"))
    assert answer(capsys, "simulate", plan, "cluster=h100_1x8", "workload.training.format=bf16")[1] == []
    shown, notes = answer(capsys, "show", plan)
    assert shown["peak_bytes"] == {} and shown["precision"] is None
    assert len(notes) == 1 and "workload.training.format" in notes[0]
    assert shown["rank_map"] == {"0-7": ["vision", "llm"]}
    told, notes = answer(capsys, "show", plan, "workload.training.format=bf16")
    assert notes == [] and told["precision"] == "bf16"
    assert "memory of a rank" not in run(capsys, "show", plan)[1]


def test_unknown_names_are_refused_with_the_way_out(capsys):
    for plan, where, words in (
        (replace(PLAN, cluster="h100_9x9"), "cluster", ["cluster=h100_1x8"]),
        (replace(PLAN, workload="vlm_8b"), "workload", ["model=vlm_7b"]),
    ):
        error, _ = answer(capsys, "simulate", written(plan), status=2)
        assert error["where"] == where and words[0].partition("=")[0] + "=NAME" in error["fix"]
    _, notes = answer(capsys, "simulate", written(replace(PLAN, cluster="h100_9x9")), "cluster=h100_1x8")
    assert notes == ["cluster=h100_1x8: the plan says h100_9x9"]


# -- large plans --------------------------------------------------------------------------------------------------


def test_a_plan_of_many_ranks_is_shown_by_classes(capsys, monkeypatch):
    ranks = 102_400
    monkeypatch.setattr(RankSet, "ranks", property(lambda _: pytest.fail("one by one")))
    layouts = {"vision": (0, ranks // 2, Layout(dp=ranks // 2)), "llm": (0, ranks, Layout(tp=8, pp=4, dp=ranks // 32))}
    modules = {name: ModulePlan(ranks=RankSet.block(a, n), layout=x) for name, (a, n, x) in layouts.items()}
    large = replace(PLAN, world_size=ranks + 8, global_batch_size=ranks // 16, modules=modules, cluster="")
    shown, _ = answer(capsys, "show", written(large))
    assert shown["rank_map"] == {
        "0-25599": ["vision", "llm"],
        "25600-51199": ["vision", "llm"],
        "51200-76799": ["llm"],
        "76800-102399": ["llm"],
        "102400-102407": [],
    }
    assert list(shown["peak_bytes"]) == ["0", "25600", "51200", "76800"]
    assert shown["groups"] is None
    status, out, _ = run(capsys, "show", written(large))
    assert status == 0
    assert "ranks 102400-102407 | .         .     | 0 B" in out.splitlines()


def test_classes_cover_every_rank_once():
    modules = {
        "vision": ModulePlan(ranks=RankSet.parse("1,3,5"), layout=Layout(dp=3)),
        "llm": ModulePlan(ranks=RankSet.parse("3-5"), layout=Layout(dp=3)),
    }
    found = all_classes(replace(PLAN, modules=modules))
    assert [(str(alike.ranks), alike.lanes) for alike in found] == [
        ("0,2,6-7", ()),
        ("1", ("vision.0",)),
        ("3,5", ("vision.0", "llm.0")),
        ("4", ("llm.0",)),
    ]
