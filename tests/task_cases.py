"""A small workload of two tasks for planner tests: captions of pictures, and pairs of pictures and texts."""

from __future__ import annotations

from dataclasses import replace

from megatron_mosaic.plan.tasks.task import LossKind, TaskConfig, TaskLoss, TaskModule
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
