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

from megatron_mosaic.definition import Batch, ModelDefinition
from megatron_mosaic.model import initialize_by_name
from megatron_mosaic.plan import Layout


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
            stage = definition.build_stage(module.name, Layout(), 0, groups)
            stage.pg_collection = groups
            initialize_by_name(stage, module.name, args.seed)
            self.modules[module.name] = stage
        decayed = [p for p in self.modules.parameters() if p.dim() > 1]
        plain = [p for p in self.modules.parameters() if p.dim() <= 1]
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
                if parameter.grad is None:  # no item of this batch reached it
                    parameter.grad = torch.zeros_like(parameter)
                gradients[f"{module}/{name}"] = parameter.grad.numpy().copy()
        if self._args.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.modules.parameters(), self._args.clip_grad)
        self._optimizer.step()
        return ReferenceStep(losses={name: float(v[0] / v[1]) for name, v in report.items()}, gradients=gradients)

    def _forward(self, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(weighted loss sum, loss tokens, report) over all modules, in the DAG's order."""
        counts = self._definition.count_items(batch)
        exports: dict[str, Any] = {}
        total: Tensor | None = None
        num_tokens = 0
        report: dict[str, Tensor] = {}
        for module in self._definition.workload.modules:
            items = range(sum(counts[module.name]))
            if not items:
                continue
            inputs = self._definition.select_inputs(module.name, batch, items)
            imports = {
                edge.source: exports[edge.source][module.name]
                for edge in self._definition.workload.edges
                if edge.target == module.name and edge.source in exports
            }
            output = self.modules[module.name](inputs, None, imports)
            exports[module.name] = output.exports
            if output.loss is not None:
                total = output.loss if total is None else total + output.loss
                num_tokens += output.num_tokens
                report |= dict(output.report)
        assert total is not None, "a workload without a loss"
        return total, num_tokens, report
