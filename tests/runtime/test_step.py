"""One step in one process: what lanes hand to each other, keep, count and tell, with stages that are a few lines.

The oracle is autograd on the same arithmetic without lanes.
"""

from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.definition import StageOutput
from megatron_mosaic.parallel_state_ext.boundaries.exchange import Channels
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links
from megatron_mosaic.parallel_state_ext.boundaries.step_map import PlanMap
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout, Plan, Recompute
from megatron_mosaic.plan.workload import Edge, Role, Workload
from megatron_mosaic.runtime.lane_runner import LaneTools, unscaled
from megatron_mosaic.runtime.loss_sums import LossSums
from megatron_mosaic.runtime.report import Observers, UnitStatistics
from megatron_mosaic.runtime.step import Batches, Step
from megatron_mosaic.schedules import Action, Schedule
from megatron_mosaic.schedules.lane_work import LaneWork
from tests.cases import make_plan
from tests.worlds import BACKBONE, WIDTH, module

EDGE = Edge(source="encoder", target=BACKBONE, rows_per_item=1, width=WIDTH)
WORKLOAD = Workload(
    name="one row", modules=(module("encoder", Role.encoder), module(BACKBONE, Role.backbone)), edges=(EDGE,)
)
PLAN: Plan = make_plan(
    {"encoder": ("0", Layout()), BACKBONE: ("0", Layout())}, workload=WORKLOAD, world_size=1, global_batch_size=2
)
TRAINING = "encoder.0F0 llm.0F0 encoder.0F1 llm.0B0 encoder.0B0 llm.0F1 llm.0B1 encoder.0B1"
EVALUATION = "encoder.0F0 encoder.0F1 llm.0F0 llm.0F1"


def program(text: str) -> RankProgram:
    order = tuple(Action.parse(word) for word in text.split())
    lanes = {f"{name}.0": tuple(action for action in order if action.module == name) for name in PLAN.modules}
    work = LaneWork(
        num_microbatches=2, edges=(("encoder", BACKBONE),), units=dict.fromkeys(PLAN.modules, 1), lanes=lanes
    )
    return RankProgram.of(Schedule(name="by hand", work=work, order=order), lanes)


class OneRow:
    """A sample is a number; its encoder item is one row of it times `weight`, its loss the sum of the row's squares."""

    workload, loss_names = WORKLOAD, ("lm loss",)

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def list_items(self, batch):
        one = Items(np.arange(len(batch["x"])), np.ones(len(batch["x"]), dtype=np.int64))
        return {"encoder": one, BACKBONE: one}

    def list_links(self, edge, batch):
        each = np.arange(len(batch["x"]))
        return Links(each, 0 * each, each, 0 * each, np.ones_like(each))

    def select_inputs(self, module, batch, shard):
        return {"x": batch["x"][list(shard.items)]}

    def run(self, call):
        inputs = call.inputs
        if call.module == "encoder":
            rows = self.weight * inputs.tensors["x"][:, None].expand(-1, WIDTH)
            return StageOutput(exports={BACKBONE: rows[inputs.exports_at[BACKBONE][1]]}), loss_function
        loss = inputs.imports["encoder"].square().sum()
        return StageOutput(loss=loss, num_tokens=len(inputs.shard.items)), loss_function


def loss_function(output):
    return output.loss, output.num_tokens, {"lm loss": torch.stack([output.loss.detach(), torch.tensor(1.0)])}


@contextmanager
def opened(plan):
    cpu.install()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    view = RankView.of(plan, 0, WORKLOAD.edges)
    yield Channels(view, WORKLOAD, Grids(view, timeout=timedelta(seconds=30)), torch.float32)
    dist.destroy_process_group()


@pytest.fixture
def channels():
    with opened(PLAN) as made:
        yield made


def begin(channels: Channels, text: str, model: OneRow, told: list[str]) -> tuple[Step, LaneTools]:
    """A step of two microbatches with the samples 1 and 2."""

    @contextmanager
    def activate(name):
        told.append(name)
        yield

    tools = LaneTools(
        definition=model,
        sums=LossSums(names=model.loss_names),
        observers=Observers(units=UnitStatistics(PLAN.modules)),
        run_stage=model.run,
        activate=activate,
        streams=lambda name: {"as they were": torch.tensor(len(told))},
        activate_again=lambda name, streams: activate(f"{name} again, {int(streams['as they were'])}"),
        scale_loss=unscaled,
        finished=lambda name: told.append(f"{name} is done"),
    )
    chosen = tools if "B" in text else tools.for_evaluation()
    of_plan = PlanMap(channels.view, WORKLOAD)
    return Step(program(text), [[1.0], [2.0]], lambda one: {"x": torch.tensor(one)}, of_plan, channels, chosen), tools


def run(step: Step) -> torch.Tensor:
    times = [step.perform(action, lambda: 0.0) for action in step.program.actions]
    assert times == [(0.0, 0.0)] * len(step.program.actions)
    return step.finish()


def test_a_training_step_is_autograd_on_the_same_sums(channels) -> None:
    model, told = OneRow(), []
    step, tools = begin(channels, TRAINING, model, told)
    totals = run(step)
    # WIDTH rows' values (w x)^2 for x = 1, 2 and w = 3; derivative 2 w x^2 each
    assert totals.tolist() == [2.0, 9.0 * 5 * WIDTH, 9.0 * 5 * WIDTH, 2.0]
    assert float(model.weight.grad) == 2 * 3.0 * 5 * WIDTH
    assert [name for name in told if "done" in name] == ["llm is done", "encoder is done"]
    assert told[-1] == "encoder is done" and len(told) == len(step.program.actions) + 2
    assert tools.observers.units.measures()["empty_units_by_module"] == {"encoder": 0, BACKBONE: 0}
    assert tools.observers.units.measures()["imbalance_by_module"] == {"encoder": 1.0, BACKBONE: 1.0}


def test_a_whole_forward_is_run_again_and_only_then_has_a_graph() -> None:
    """The encoder's second run is inside its backward, with the streams of its first; what it adds counts once."""
    placed = replace(PLAN.modules["encoder"], recompute=Recompute.whole)
    model, told, graphs = OneRow(), [], []
    run_once = model.run

    def run_and_look(call):
        output, loss = run_once(call)
        graphs.extend(rows.requires_grad for rows in output.exports.values())
        return output, loss

    model.run = run_and_look
    with opened(replace(PLAN, modules={**PLAN.modules, "encoder": placed})) as channels:
        step, tools = begin(channels, TRAINING, model, told)
        totals = run(step)
    assert totals.tolist() == [2.0, 9.0 * 5 * WIDTH, 9.0 * 5 * WIDTH, 2.0]
    assert float(model.weight.grad) == 2 * 3.0 * 5 * WIDTH
    assert graphs == [False, False, True, True]
    again = [name for name in told if "again" in name]
    assert again == ["encoder again, 0", "encoder again, 2"]
    assert told[told.index(again[0]) + 1] == "encoder"  # autograd itself
    assert tools.observers.units.measures()["imbalance_by_module"] == {"encoder": 1.0, BACKBONE: 1.0}


def test_an_evaluation_keeps_nothing_and_tells_nobody(channels) -> None:
    model, told = OneRow(), []
    step, tools = begin(channels, EVALUATION, model, told)
    assert run(step).tolist() == [2.0, 9.0 * 5 * WIDTH, 9.0 * 5 * WIDTH, 2.0]
    assert model.weight.grad is None
    assert told == ["encoder", "encoder", BACKBONE, BACKBONE]
    assert tools.observers.units.measures()["imbalance_by_module"] == {}


def test_a_forward_whose_backward_never_came_is_an_error(channels) -> None:
    step, _ = begin(channels, TRAINING, OneRow(), [])
    for action in step.program.actions[:-1]:
        step.perform(action, lambda: 0.0)
    with pytest.raises(AssertionError, match="'encoder': 1"):
        step.finish()


def test_batches_are_made_once_and_joined_in_order() -> None:
    calls = []

    def collate(samples):
        calls.append(list(samples))
        return {"x": torch.tensor(samples)}

    batches = Batches([[1, 2], [3, 4], [5, 6]], collate)
    assert batches.covering(range(1, 3))["x"].tolist() == [3, 4, 5, 6]
    assert batches.covering(range(1, 2)) is batches.of_microbatch[1]
    assert batches.covering(range(1, 3)) is batches.covering(range(1, 3))
    assert calls == [[1, 2], [3, 4], [5, 6], [3, 4, 5, 6]]
