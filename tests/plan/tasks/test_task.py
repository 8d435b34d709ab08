"""Workloads of several tasks: what is written is read back, and what nobody could train is refused by name."""

from dataclasses import replace

import pytest
import yaml

from megatron_mosaic.config import load_workload
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.tasks.task import LossKind, TaskConfig, TaskLoss, TaskModule
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import format_workload, load_workload_file
from tests.cases import WORKLOAD
from tests.task_cases import CAPTION, PAIRS, TASKS


def _write(tmp_path, change) -> str:
    """A model file of the two tasks after a change of its values."""
    data = yaml.safe_load(format_workload(TASKS))
    change(data)
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(path)


def test_round_trip(tmp_path):
    assert load_workload_file(_write(tmp_path, lambda data: None)) == TASKS


@pytest.mark.parametrize("model", ["multitask_clip_4", "multitask_clip_10", "ofasys", "qwen_val"])
def test_shipped_models_round_trip(model, tmp_path):
    workload = load_workload([f"model={model}"])
    path = tmp_path / "model.yaml"
    path.write_text(format_workload(workload))
    assert load_workload_file(path) == workload
    assert load_workload_file(path).digest == workload.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["tasks"]["pairs"].pop("loss"), r"tasks\.pairs\.loss"),
        (lambda data: data["tasks"].pop("pairs"), "6 samples"),
        (lambda data: data["tasks"]["pairs"].update(samples=3), r"9 samples \(caption 6, pairs 3\)"),
        (
            lambda data: (
                data["tasks"].pop("caption"),
                data.update(global_batch_size=10),
                data["tasks"]["pairs"].update(samples=10),
            ),
            "module llm",
        ),
        (lambda data: data["tasks"]["caption"].update(edges=["text->llm"]), "text->llm"),
        (lambda data: data["tasks"]["caption"].update(edges=[]), r"loss\.modules"),
        (lambda data: data["tasks"]["caption"]["loss"].update(modules=["vision"]), r"loss\.modules"),
        (lambda data: data["tasks"]["caption"]["loss"].update(kind="regression"), "output_size"),
        (lambda data: data["tasks"]["pairs"]["loss"].update(kind="hinge"), r"tasks\.pairs\.loss\.kind"),
        (lambda data: data["tasks"]["pairs"].update(modules={"vision": {}, "sound": {}}), "sound"),
        (lambda data: data["modules"]["text"].update(output_size=8), "the same on both"),
        (lambda data: data["tasks"]["pairs"].update(share=0.5), r"tasks\.pairs\.share"),
    ],
)  # fmt: skip
def test_refuses_by_name(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        load_workload_file(_write(tmp_path, change))
    assert caught.value.fix


def test_an_edge_of_no_task_is_refused():
    alone = replace(CAPTION, modules=(TaskModule(name="llm"),), edges=())
    with pytest.raises(ConfigError, match="edge vision->llm"):
        replace(TASKS, tasks=(alone, PAIRS))


def test_another_batch_scales_samples_or_is_refused(tmp_path):
    path = _write(tmp_path, lambda data: None)
    workload = load_workload([f"model={path}", "workload.global_batch_size=20"])
    assert [task.samples for task in workload.tasks] == [12, 8]
    with pytest.raises(ConfigError, match=r"task 'caption': samples.*\n.*6 of 10 samples, 9.6 of 16"):
        load_workload([f"model={path}", "workload.global_batch_size=16"])


def test_what_knows_of_one_flow_refuses_tasks_by_name():
    with pytest.raises(ConfigError, match="caption, pairs"):
        _ = TASKS.backbone
    assert WORKLOAD.backbone.name == "llm"


def test_digest_follows_tasks_but_not_their_samples():
    def with_task(index: int, **changes) -> Workload:
        tasks = [replace(task, **changes) if i == index else task for i, task in enumerate(TASKS.tasks)]
        return replace(TASKS, tasks=tuple(tasks))

    twice = tuple(replace(task, samples=2 * task.samples) for task in TASKS.tasks)
    assert replace(TASKS, global_batch_size=20, tasks=twice).digest == TASKS.digest
    longer = (TaskModule(name="vision"), TaskModule(name="text", tokens_per_item=32))
    assert with_task(1, modules=longer).digest != TASKS.digest
    assert with_task(0, name="other").digest != TASKS.digest


def test_levels_are_the_longest_ways():
    task = TaskConfig(
        name="chain",
        samples=1,
        modules=tuple(TaskModule(name=name) for name in "abcd"),
        edges=(("a", "b"), ("b", "d"), ("a", "d"), ("c", "d")),
        loss=TaskLoss(kind=LossKind.next_token, modules=("d",)),
    )
    assert task.levels() == {"a": 0, "b": 1, "c": 0, "d": 2}
