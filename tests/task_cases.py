"""A small workload of two tasks for planner tests: captions of pictures, and pairs of pictures and texts."""

from __future__ import annotations

from dataclasses import replace

from megatron_mosaic.plan import Layout, RankSet
from megatron_mosaic.plan.tasks.task import LossKind, TaskConfig, TaskLoss, TaskModule
from megatron_mosaic.plan.tasks.waves import Slice, WavePlan
from megatron_mosaic.plan.workload import Workload
from tests.cases import EDGES, LLM, VISION

TEXT = replace(VISION, name="text", num_layers=2, vocab_size=128, input_size=0)
CAPTION = TaskConfig(
    name="caption",
    samples=6,
    modules=(TaskModule(name="vision"), TaskModule(name="llm", tokens_per_item=32)),
    edges=(("vision", "llm"),),
    loss=TaskLoss(kind=LossKind.next_token, modules=("llm",)),
)
PAIRS = TaskConfig(
    name="pairs",
    samples=4,
    modules=(TaskModule(name="vision", items_per_sample=2.0), TaskModule(name="text")),
    edges=(),
    loss=TaskLoss(kind=LossKind.contrastive, modules=("vision", "text")),
)
TASKS = Workload(
    name="two_tasks",
    modules=(VISION, TEXT, LLM),
    edges=(EDGES[0],),
    global_batch_size=10,
    tasks=(CAPTION, PAIRS),
)


def slice_of(task: str, module: str, ranks: str, *, layout: Layout | None = None) -> Slice:
    """All layers of a module, by default in dp."""
    found = RankSet.parse(ranks)
    layers = TASKS.by_name[module].num_layers
    return Slice(
        task=task,
        module=module,
        first_layer=0,
        num_layers=layers,
        ranks=found,
        layout=layout or Layout(dp=len(found)),
    )


def cut(each: Slice, first_layer: int, num_layers: int) -> Slice:
    """Some of its layers."""
    return replace(each, first_layer=first_layer, num_layers=num_layers)


# The vision tower on ranks 0-1 for captions, and on rank 2 for pairs
TWO_WAVES = WavePlan(
    workload="two_tasks",
    digest=TASKS.digest,
    world_size=6,
    global_batch_size=10,
    waves=(
        (slice_of("caption", "vision", "0-1"), slice_of("pairs", "vision", "2"), slice_of("pairs", "text", "3")),
        (slice_of("caption", "llm", "0-1"),),
    ),
)
