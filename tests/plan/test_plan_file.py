"""Plan files: a written plan reads back equal; a wrong file is refused with the path of what is wrong in it."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.errors import PlanError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, Plan, Prediction, Quota, Recompute, ScheduleChoice
from megatron_mosaic.plan.plan_file import SCHEMA_FILE, format_plan, load_plan, parse_plan, plan_schema, save_plan
from megatron_mosaic.plan.training import Format, TrainingSetup
from tests.cases import WORKLOAD, make_plan, plans

TEXT = """\
mosaic_plan: 1
workload: toy
world_size: 4
global_batch_size: 16
micro_batch_size: 2
schedule: 1f1b
modules:
  vision: {ranks: 0-3, layout: {dp: 4}, quota: 0.33, unit: 2, recompute: full}
  llm: {ranks: "0-1,3", layout: {tp: 3}}
  generator: {ranks: 2}
"""


NESTED = ScheduleChoice("nested", FrozenMap({"warmup_units": 4}))
LOCAL = FrozenMap({"kind": "local", "num_ranks": 4, "profile": "made up"})
LINK = {"name": "link", "bytes_per_s": 1e9, "latency_s": 1e-6, "source": "made up"}
GPUS = FrozenMap(
    {"kind": "gpu", "name": "mine", "gpu": "h100_sxm", "num_nodes": 1, "gpus_per_node": 8, "intra": LINK, "inter": LINK}
)
MEASURED = {
    "gpu_type": 1,
    "base": "h100_sxm",
    "half_depth": 99.5,
    "sources": {"half_depth": "a: ${b}"},
    "name": "a.yaml",
}
SHARES = st.floats(0, 1)


@st.composite
def decorated_plans(draw):
    """Plans with every optional key present or absent."""
    plan = draw(plans(world_size=8))
    modules = {
        name: type(m)(
            ranks=m.ranks,
            layout=m.layout,
            quota=Quota(share=draw(st.sampled_from([1.0, 0.5, 0.333333]))),
            unit=draw(st.integers(0, 4)),
            recompute=draw(st.sampled_from(list(Recompute))),
        )
        for name, m in plan.modules.items()
    }
    predicted = draw(
        st.none()
        | st.builds(
            Prediction,
            step_s=st.floats(1e-6, 1e3),
            peak_bytes=st.floats(1, 1e12),
            cost_model=st.text("abc ,:#'\"", max_size=8),
        )
    )
    return Plan(
        workload=plan.workload,
        digest=draw(st.sampled_from(["", WORKLOAD.digest])),
        world_size=plan.world_size,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        schedule=draw(st.sampled_from([ScheduleChoice("1f1b"), NESTED])),
        modules=modules,
        cluster=draw(st.sampled_from(["", "h100_1x8", LOCAL, GPUS, FrozenMap({**GPUS, "gpu": MEASURED})])),
        training=draw(st.none() | st.builds(TrainingSetup, format=st.sampled_from(Format), tp_overlap_frac=SHARES)),
        predicted=predicted,
    )


@given(decorated_plans())
def test_round_trip(plan):
    again = parse_plan(format_plan(plan))
    assert (again, again.predicted) == (plan, plan.predicted)  # equality leaves the prediction out
    assert hash(again) == hash(plan)


@settings(max_examples=20)
@given(decorated_plans())
def test_schema_accepts_what_is_written(plan):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load(format_plan(plan)), plan_schema())


def test_reads_every_key():
    plan = parse_plan(TEXT)
    vision = plan.modules["vision"]
    assert (str(vision.ranks), vision.layout, vision.quota.share, vision.unit) == ("0-3", Layout(dp=4), 0.33, 2)
    assert vision.recompute is Recompute.full
    assert plan.modules["llm"].ranks.ranks == (0, 1, 3)
    assert plan.modules["generator"].layout == Layout()  # everything defaults to 1; a bare rank needs no quotes
    assert plan.predicted is None


@pytest.mark.parametrize(
    ("old", "new", "where", "expected"),
    [
        ("mosaic_plan: 1", "mosaic_plan: 2", "mosaic_plan", "less than or equal to 1"),
        ("mosaic_plan: 1\n", "", "mosaic_plan", "this key to be present"),
        ("schedule: 1f1b", "schedule: 1f1b\nshedule: x", "shedule", "a key of the plan format"),
        ("{dp: 4}", "{dp: 4, xp: 1}", "modules.vision.layout.xp", "a key of the plan format"),
        ("{dp: 4}", "{dp: 0}", "modules.vision.layout.dp", "greater than or equal to 1"),
        ("{dp: 4}", "{dp: 4.0}", "modules.vision.layout.dp", "valid integer"),
        ("{dp: 4}", "{dp: 2}", "modules.vision.ranks", "2 ranks for layout dp2"),
        ("ranks: 0-3", "ranks: 3-0", "modules.vision.ranks", "ascending"),
        ("ranks: 0-3", "ranks: [0, 1]", "modules.vision.ranks", "valid string"),
        ("quota: 0.33", "quota: 0", "modules.vision.quota", "greater than 0"),
        ("quota: 0.33", "quota: 1.5", "modules.vision.quota", "less than or equal to 1"),
        ("unit: 2", "unit: 0", "modules.vision.unit", "greater than or equal to 1"),
        ("recompute: full", "recompute: some", "modules.vision.recompute", "'none', 'selective', 'full' or 'whole'"),
        ("world_size: 4", "world_size: 3", "modules.vision.ranks", "ranks below world_size 3"),
        ("world_size: 4", "world_size: true", "world_size", "valid integer"),
        ("workload: toy", "workload: [toy", "plan:3", "valid YAML"),
        ("workload: toy", "workload: " + "[" * 100_000, "plan:2", "valid YAML"),
        ("workload: toy", "workload: toy\nworkload: toy", "plan:3", "valid YAML"),
        ("ranks: 0-3", "ranks: 0-99999999999", "modules.vision.ranks", "ranks below 1048576"),
        ("ranks: 0-3", "ranks: 0-1048576", "modules.vision.ranks", "ranks below 1048576"),
        ("ranks: 0-3", "ranks: 0-" + "9" * 5000, "modules.vision.ranks", "ranks below 1048576"),
        ("ranks: 0-3", "ranks: ٠-٣", "modules.vision.ranks", "spans like 0-3"),
        ("{dp: 4}", "{dp: 100000000000}", "modules.vision.layout.dp", "less than or equal to 1048576"),
        ("world_size: 4", "world_size: 100000000000", "world_size", "less than or equal to 1048576"),
        ("schedule: 1f1b", "schedule: 7", "schedule", "a section"),
        ("schedule: 1f1b", "schedule: {name: nested, warmup_units: x}", "schedule.warmup_units", "valid integer"),
        ("schedule: 1f1b", "schedule: 1f1b\ncluster: {kind: gpu}", "cluster.name", "this key to be present"),
        ("schedule: 1f1b", "schedule: 1f1b\ncluster: {kind: local, num_ranks: 0}", "cluster.num_ranks", "equal to 1"),
        ("schedule: 1f1b", "schedule: 1f1b\ncluster: {kind: tpu}", "cluster.kind", "'gpu'"),
        ("schedule: 1f1b", "schedule: 1f1b\ncluster: {kind: local, num_ranks: 4, x: 1}", "cluster.x", "a key of the"),
        *(
            (
                "schedule: 1f1b",
                "schedule: 1f1b\ncluster: " + json.dumps({**dict(GPUS), "gpu": gpu}, default=dict),
                f"cluster.gpu{where}",
                expected,
            )
            for gpu, where, expected in (
                ({**MEASURED, "half_depth": 0}, ".half_depth", "greater than 0"),
                ({**MEASURED, "half_depth": "9"}, ".half_depth", "valid number"),
                ({**MEASURED, "depth": 9}, ".depth", "a key of the plan format"),
                ({**MEASURED, "launch_s": 0.5}, "", "sources of the constants that are set"),
                ({**MEASURED, "sources": {}}, "", "sources of the constants that are set"),
                ({**MEASURED, "sources": {"half_depth": " "}}, ".sources.half_depth", "match pattern"),
                ({key: MEASURED[key] for key in MEASURED if key != "base"}, ".base", "this key to be present"),
                (7, "", "a section"),
            )
        ),
        ("schedule: 1f1b", "schedule: 1f1b\ntraining: {format: bf17}", "training.format", "'bf16'"),
        (
            "schedule: 1f1b",
            "schedule: 1f1b\ntraining: {tp_overlap_frac: 2}",
            "training.tp_overlap_frac",
            "or equal to 1",
        ),
        ("world_size: 4", "world_size: 0x" + "f" * 300, "world_size", "less than or equal to 1048576"),
        ("world_size: 4", "world_size: 0x" + "f" * 5000, "plan:3", "valid YAML"),
        ("quota: 0.33", "quota: .nan", "modules.vision.quota", "finite number"),
        (
            "{ranks: 2}",
            "{ranks: 2}\npredicted: {step_s: .inf, peak_bytes: 1, cost_model: x}",
            "predicted.step_s",
            "finite",
        ),
        (
            "{ranks: 2}",
            "{ranks: 2}\npredicted: {step_s: 1, peak_bytes: 1e+30, cost_model: x}",
            "predicted.peak_bytes",
            "less than",
        ),
        (
            "{ranks: 2}",
            "{ranks: 2}\npredicted: {step_s: -1, peak_bytes: 1, cost_model: x}",
            "predicted.step_s",
            "or equal to 0",
        ),
        ("size: 16", "size: 100000000000", "global_batch_size", "less than or equal to 1048576"),
    ],
)
def test_refuses(old, new, where, expected):
    assert old in TEXT
    with pytest.raises(PlanError) as caught:
        parse_plan(TEXT.replace(old, new, 1), where="plan")
    assert caught.value.where.removeprefix("plan: ") == where
    assert expected in caught.value.expected
    assert caught.value.fix


def test_a_repeated_key_is_named_with_its_line():
    with pytest.raises(PlanError) as caught:
        parse_plan(TEXT.replace("schedule: 1f1b", "schedule: 1f1b\nworld_size: 8"))
    assert "the key 'world_size' stands twice" in caught.value.got
    assert "line 7" in caught.value.got


def test_refuses_what_is_no_mapping():
    with pytest.raises(PlanError, match="list"):
        parse_plan("- 1")


def test_lists_the_other_violations():
    wrong = TEXT.replace("micro_batch_size: 2", "micro_batch_size: x").replace("{tp: 3}", "{tp: y}")
    with pytest.raises(PlanError, match=r"also wrong: modules\.llm\.layout\.tp"):
        parse_plan(wrong)


def test_files(tmp_path):
    plan = make_plan({"llm": ("0-3", Layout(dp=4))})
    path = tmp_path / "plan.yaml"
    save_plan(plan, path)
    assert load_plan(path) == plan
    with pytest.raises(PlanError, match="no such file"):
        load_plan(tmp_path / "other.yaml")
    with pytest.raises(PlanError, match="readable text"):
        load_plan(tmp_path)
    with pytest.raises(PlanError, match="create the directory"):
        save_plan(plan, tmp_path / "missing" / "plan.yaml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="readable text"):
        load_plan(path)


def test_schema_file_is_the_schema():
    # To write it again: python -c "import json; from megatron_mosaic.plan.plan_file import *; SCHEMA_FILE.write_text(
    #   json.dumps(plan_schema(), indent=2) + '\n')"
    assert json.loads(SCHEMA_FILE.read_text()) == plan_schema()
