"""The oracle: the same model on one process, plain autograd, the whole global batch at once.

Nothing of the runtime takes part: no boundaries, no microbatches, no DistributedDataParallel, no Megatron optimizer
(torch.optim.AdamW and torch's own clipping instead). Only the modules' code and their initialisation are shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_mosaic.batch import Integers, shard_of
from megatron_mosaic.definition import Batch, ModelDefinition, Place, StageInputs
from megatron_mosaic.model import initialize_by_name
from megatron_mosaic.plan import Layout, ModulePlan, RankSet

ALONE = ModulePlan(ranks=RankSet((0,)), layout=Layout())


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStep:
    """Losses (mean over their own tokens) and gradients (`module/parameter`) of one optimizer step."""

    losses: dict[str, float]
    gradients: dict[str, np.ndarray]

    def save(self, directory: str, step: int) -> None:
        """Write `reference-STEP.npz`: losses under `loss/NAME`, gradients under `MODULE/PARAMETER`."""
        losses = {f"loss/{name}": np.float64(value) for name, value in self.losses.items()}
        np.savez(f"{directory}/reference-{step:04d}.npz", **(losses | self.gradients))  # type: ignore[arg-type]


class Reference:
    """The undivided model with its optimizer. Runs in a process whose torch.distributed world is itself."""

    def __init__(self, definition: ModelDefinition, groups: ProcessGroupCollection, args: Any) -> None:
        self._definition, self._args = definition, args
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        self.modules = nn.ModuleDict()
        for module in definition.workload.modules:
            stage = definition.build_stage(module.name, ALONE, 0, groups)
            stage.pg_collection = groups
            initialize_by_name(stage, module.name, args.seed)
            self.modules[module.name] = stage
        decayed = [p for p in self.modules.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in self.modules.parameters() if p.requires_grad and p.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
        )

    def step(self, batch: Batch) -> ReferenceStep:
        """One optimizer step on a whole global batch."""
        self._optimizer.zero_grad()
        loss, num_tokens, report = self._forward(batch)
        (loss / num_tokens).backward()
        gradients = {}
        for module, stage in self.modules.items():
            for name, parameter in stage.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:  # no item of this batch reached it
                    parameter.grad = torch.zeros_like(parameter)
                gradients[f"{module}/{name}"] = parameter.grad.numpy().copy()
        if self._args.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.modules.parameters(), self._args.clip_grad)
        self._optimizer.step()
        return ReferenceStep(losses={name: float(v[0] / v[1]) for name, v in report.items()}, gradients=gradients)

    def _forward(self, batch: Batch) -> tuple[Tensor, float, dict[str, Tensor]]:
        """(weighted loss sum, loss tokens, report) over all modules, in the DAG's order."""
        workload, items = self._definition.workload, self._definition.list_items(batch)
        rows: dict[tuple[str, str], Tensor] = {}
        total: Tensor | None = None
        num_tokens = 0.0
        report: dict[str, Tensor] = {}
        for module in workload.modules:
            if not len(items[module.name]):
                continue
            shard = shard_of(ALONE, range(len(items[module.name])), items[module.name].tokens)
            found = {
                e: self._definition.list_links(e, batch) for e in workload.edges if module.name in (e.source, e.target)
            }
            links = {edge: link for edge, link in found.items() if len(link)}
            inputs = StageInputs(
                shard=shard,
                tensors=self._definition.select_inputs(module.name, batch, shard),
                imports={e.source: rows[e.source, e.target] for e in links if e.target == module.name},
                imports_at={
                    e.source: _place(link.target_items, link.target_starts, link.rows)
                    for e, link in links.items()
                    if e.target == module.name
                },
                exports_at={
                    e.target: _place(link.source_items, link.source_starts, link.rows)
                    for e, link in links.items()
                    if e.source == module.name
                },
            )
            output = self.modules[module.name](inputs)
            rows |= {(module.name, target): exported for target, exported in output.exports.items()}
            if output.loss is not None:
                total = output.loss if total is None else total + output.loss
                num_tokens += output.num_tokens
                report |= dict(output.report)
        assert total is not None, "a workload without a loss"
        return total, num_tokens, report


def _place(items: Integers, starts: Integers, rows: Integers) -> Place:
    """(token, item) of every row, link by link."""
    tokens = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, rows, strict=True)] or [rows])
    return torch.from_numpy(tokens), torch.from_numpy(np.repeat(items, rows))
