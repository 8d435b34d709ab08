"""The three tasks of the digits: their data, the contrastive loss, and an oracle in which every task learns."""

import math

import pytest
import torch

from megatron_mosaic.any2any.blocks import config_from_args
from megatron_mosaic.any2any.data import DigitsDataset, Split, collate
from megatron_mosaic.any2any.definition import Any2Any, loss_edges
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix
from megatron_mosaic.any2any.tasks.data import TaskSamples
from megatron_mosaic.any2any.tasks.losses import contrastive_sum
from megatron_mosaic.config import load_workload
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parity.reference import Reference
from megatron_mosaic.parity.task_reference import TaskReference
from tests.any2any.conftest import groups_of

WORKLOAD = load_workload(["model=any2any-tasks"])


@pytest.fixture
def definition(args):
    return Any2Any(WORKLOAD, build_config=lambda sizes, placed: config_from_args(args, sizes, placed))


@pytest.fixture
def reference(args, definition):
    args.lr, args.min_lr, args.lr_warmup_iters, args.lr_decay_style = 3e-3, 3e-3, 0, "constant"
    args.mosaic_lr_mult = []
    return TaskReference(definition, groups_of(torch.distributed.group.WORLD), args)


def test_contrastive_sum_is_written_out():
    """Two pairs, by hand: unit rows, temperature 0.1."""
    one, other = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    logits = [[10.0, 10 * half], [0.0, 10 * half]]

    def cross(row, i):
        return math.log(sum(map(math.exp, row))) - row[i]

    columns = list(zip(*logits))
    expected = sum(cross(logits[i], i) + cross(columns[i], i) for i in range(2)) / 2
    assert contrastive_sum(one, other).item() == pytest.approx(expected, rel=1e-5)


def test_samples_depend_on_their_number_alone():
    samples = TaskSamples(WORKLOAD, Split.train, seed=3)
    for task in ("caption", "pairs", "draw"):
        together, alone = samples.batch(task, range(4)), samples.batch(task, range(2, 3))
        key = "text/values" if task == "pairs" else "tokens"
        assert torch.equal(together[key][2], alone[key][0])
    sizes = {task: len(batch.get("tokens", batch.get("text/samples"))) for task, batch in samples.step(1).items()}
    assert sizes == {"caption": 12, "pairs": 10, "draw": 10}
    with pytest.raises(ConfigError, match="caption"):
        TaskSamples(load_workload(["model=multitask_clip_4"]), Split.train, seed=3)


def test_a_task_has_items_of_its_own_modules_only(definition):
    step = TaskSamples(WORKLOAD, Split.train, seed=3).step(0)
    items = {task: definition.list_items(batch) for task, batch in step.items()}
    assert [name for name, found in items["pairs"].items() if len(found)] == ["vision", "text"]
    assert [name for name, found in items["caption"].items() if len(found)] == ["vision", "llm"]
    assert [name for name, found in items["draw"].items() if len(found)] == ["llm", "generator"]
    assert [(edge.source, edge.target) for edge in loss_edges(WORKLOAD)] == [("vision", "pairs"), ("text", "pairs")]


def _divisors(step) -> dict[str, float]:
    """Loss tokens of each task, counted from its data."""
    return {
        "caption": float(step["caption"]["loss_mask"].sum()),
        "pairs": float(len(step["pairs"]["text/samples"])),
        "draw": float(step["draw"]["generator/targets"].shape[:2].numel()),
    }


def test_gradients_of_shared_modules_are_sums_with_one_divisor(reference):
    """The step of all tasks against each task alone: its gradients times its own divisor, over the sum of all."""
    step = TaskSamples(WORKLOAD, Split.train, seed=3).step(0)
    losses, together = reference.find_gradients(step)
    alone = {task: reference.find_gradients({task: batch}) for task, batch in step.items()}
    assert losses == pytest.approx({task: found[0][task] for task, found in alone.items()}, rel=1e-6)
    counts = _divisors(step)
    total = sum(counts.values())
    for name, gradient in together.items():
        expected = sum(counts[task] / total * alone[task][1][name] for task in step)
        assert abs(gradient - expected).max() <= 1e-5 * max(abs(expected).max(), 1e-3), name
    shared = {task: abs(found[1]["vision/input_projection.weight"]).max() for task, found in alone.items()}
    assert shared["caption"] > 0 and shared["pairs"] > 0 and shared["draw"] == 0
    # a divisor of its own for each task would be seen
    name = "vision/input_projection.weight"
    wrong = sum(alone[task][1][name] for task in step)
    assert abs(together[name] - wrong).max() > 0.1 * abs(together[name]).max()


def test_one_flow_is_as_before(args, model, run_model):
    """The oracle of a workload without tasks, against every stage called by hand."""
    data = DigitsDataset("train", sizes=Any2AnySizes(), mix=DigitsMix(), num_samples=8, seed=1)
    batch = collate([data[idx] for idx in range(8)])
    args.mosaic_lr_mult = []
    oracle = Reference(model, groups_of(torch.distributed.group.WORLD), args)
    losses, gradients = oracle.find_gradients(batch)
    loss, report = run_model({name: [stage] for name, stage in oracle.modules.items()}, batch)
    oracle.modules.zero_grad()
    loss.backward()
    assert losses == pytest.approx(report, rel=1e-6)
    for name, parameter in oracle.modules.named_parameters():
        assert (parameter.grad - torch.from_numpy(gradients[name.replace(".", "/", 1)])).abs().max() == 0, name


def test_a_task_without_samples_in_a_step_leaves_its_modules_alone(reference):
    step = TaskSamples(WORKLOAD, Split.train, seed=3).step(0)
    losses, gradients = reference.find_gradients({"caption": step["caption"]})
    assert list(losses) == ["caption"]
    for name, gradient in gradients.items():
        if name.startswith(("text/", "generator/")):
            assert not gradient.any(), name


def _train(reference, num_steps, *tasks):
    """Mean losses of five steps that are not trained on, before and after."""
    train, held_out = TaskSamples(WORKLOAD, Split.train, seed=1), TaskSamples(WORKLOAD, Split.valid, seed=2)

    def evaluate():
        found = [
            reference.find_gradients({task: held_out.step(number)[task] for task in tasks})[0] for number in range(5)
        ]
        return {task: sum(losses[task] for losses in found) / len(found) for task in tasks}

    before = evaluate()
    for number in range(num_steps):
        reference.find_gradients({task: train.step(number)[task] for task in tasks})
        reference.update()
    after = evaluate()
    print(before, after)
    return before, after


def test_captions_and_drawings_learn(reference):
    before, after = _train(reference, 25, "caption", "draw")
    assert after["caption"] < 0.3 * before["caption"]
    assert after["draw"] < 0.65 * before["draw"]


def test_pairs_learn(reference, args):
    args.lr = args.min_lr = 8e-3
    before, after = _train(reference, 150, "pairs")
    assert before["pairs"] == pytest.approx(math.log(10), rel=0.25)  # a guess among ten
    assert after["pairs"] < 0.9 * math.log(10)


@pytest.mark.slow
def test_all_tasks_learn_together(reference):
    before, after = _train(reference, 200, "caption", "pairs", "draw")
    for task, frac in (("caption", 0.15), ("pairs", 0.7), ("draw", 0.4)):
        assert after[task] < frac * before[task], task
