"""The oracle for several tasks: one process, plain autograd, each task's samples through the modules that it uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_mosaic.any2any.definition import loss_edges
from megatron_mosaic.any2any.tasks.losses import contrastive_sum, mean_rows
from megatron_mosaic.definition import Batch
from megatron_mosaic.parity.reference import Reference
from megatron_mosaic.plan.tasks.task import LossKind, TaskConfig


class TaskReference(Reference):
    """The undivided model of all tasks. Its batches are mappings: task -> batch of its samples of a step.

    One divisor for all gradients: the tokens of all losses together, of a contrastive one its pairs. A task may be
    absent from a step. Losses are reported by task.
    """

    def _forward(self, batch: Mapping[str, Batch]) -> tuple[Tensor, float, dict[str, Tensor]]:  # type: ignore[override]
        report: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        divisor = 0.0
        for task in self._definition.workload.tasks:
            if task.name in batch:
                loss, count = self._task_loss(task, batch[task.name])
                losses.append(loss)
                divisor += count
                report[task.name] = torch.stack([loss.detach().double(), torch.tensor(count, dtype=torch.float64)])
        return torch.stack(losses).sum(), divisor, report

    def _task_loss(self, task: TaskConfig, batch: Batch) -> tuple[Tensor, float]:
        """Its sum, and over how much."""
        workload = self._definition.workload
        edges = [edge for edge in workload.edges if (edge.source, edge.target) in task.edges]
        flow = self._run(batch, [*edges, *(edge for edge in loss_edges(workload) if edge.target == task.name)])
        if task.loss.kind is LossKind.contrastive:
            means = []
            for edge in (each for each in loss_edges(workload) if each.target == task.name):
                lengths = torch.from_numpy(self._definition.list_links(edge, batch).rows)
                means.append(mean_rows(flow.rows[edge.source, task.name], lengths))
            return contrastive_sum(*means), float(len(means[0]))
        assert flow.loss is not None, "a module of the loss makes it"
        return flow.loss, flow.num_tokens
