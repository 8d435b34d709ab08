"""The oracle: the same model on one process, plain autograd, the whole global batch at once.

Nothing of the runtime takes part: no boundaries, no microbatches, no DistributedDataParallel, no Megatron optimizer
(torch.optim.AdamW and torch's own clipping instead). Only the modules' code and their initialisation are shared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megatron_mosaic.definition import Batch, ModelDefinition, StageInputs
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import Place
from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, rows_of, shard_of
from megatron_mosaic.parity.learning_rate import learning_rate_at
from megatron_mosaic.parity.verdict import norm
from megatron_mosaic.plan import Layout, ModulePlan, RankSet
from megatron_mosaic.plan.workload import Edge
from megatron_mosaic.runtime.arguments import lr_mults_from_args
from megatron_mosaic.runtime.model import initialize_by_name

ALONE = ModulePlan(ranks=RankSet.of([0]), layout=Layout())

Gradients = dict[str, np.ndarray]  # `module/parameter` -> array of the parameter's shape


class Reference:
    """The undivided model with its optimizer. Runs in a process whose torch.distributed world is itself.

    `_num_steps` were made.
    """

    def __init__(self, definition: ModelDefinition, groups: ProcessGroupCollection, args: Any) -> None:
        self._definition, self._args = definition, args
        self._num_steps = 0
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        self.modules = nn.ModuleDict()
        for module in definition.workload.modules:
            stage: MegatronModule = definition.build_stage(module.name, ALONE, 0, groups)
            stage.pg_collection = groups
            initialize_by_name(stage, module.name, args.seed)
            self.modules[module.name] = stage
        factors = lr_mults_from_args(args, [module.name for module in definition.workload.modules])
        trained = [(name, p) for name in factors for p in self.modules[name].parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p], "factor": factors[name], "weight_decay": args.weight_decay * (p.dim() > 1)}
                for name, p in trained
            ],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
        )

    def find_gradients(self, batch: Batch) -> tuple[dict[str, float], Gradients]:
        """Losses and gradients of a whole global batch; the gradients stay on the parameters, for `update`."""
        self._optimizer.zero_grad()
        loss, num_tokens, report = self._forward(batch)
        if loss.requires_grad:  # not where this batch brings nothing to what is trained
            (loss / num_tokens).backward()
        gradients = {}
        parameter: nn.Parameter
        for name, parameter in self._named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # no item of this batch reached it
                parameter.grad = torch.zeros_like(parameter)
            gradients[name] = parameter.grad.numpy().copy()
        return {name: float(v[0] / v[1]) for name, v in report.items()}, gradients

    def find_rounding(self, batch: Batch, gradients: Gradients) -> dict[str, float]:
        """How far each of the batch's gradients moves, in the 2-norm, when the last bit of every weight does.

        Leaves the batch's own gradients on the parameters.
        """
        moved = [self._find_gradients_nearby(batch, seed) for seed in range(5)]
        parameter: nn.Parameter
        for name, parameter in self._named_parameters():
            if name in gradients:
                parameter.grad = torch.from_numpy(gradients[name].copy())
        return {name: _distance([near[name] for near in moved], gradients[name]) for name in gradients}

    def update(self) -> None:
        """One optimizer step by the gradients on the parameters."""
        if self._args.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.modules.parameters(), self._args.clip_grad)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(self._args, self._num_steps, group["factor"])
        self._optimizer.step()
        self._num_steps += 1

    @property
    def parameters(self) -> Gradients:
        """`module/parameter` -> value, trained or not."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self._named_parameters()}

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module, stage in self.modules.items():
            for name, parameter in stage.named_parameters():
                yield f"{module}/{name}", parameter

    @torch.no_grad()
    def _find_gradients_nearby(self, batch: Batch, seed: int) -> Gradients:
        """Gradients with every weight one float up or down, as a coin decides."""
        coins = torch.Generator().manual_seed(seed)
        kept = [parameter.clone() for parameter in self.modules.parameters()]
        for parameter in self.modules.parameters():
            up = torch.rand(parameter.shape, generator=coins) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
        with torch.enable_grad():
            _, gradients = self.find_gradients(batch)
        for parameter, value in zip(self.modules.parameters(), kept, strict=True):
            parameter.copy_(value)
        return gradients

    def _forward(self, batch: Batch) -> tuple[Tensor, float, dict[str, Tensor]]:
        """(weighted loss sum, loss tokens, report) over all modules."""
        flow = self._run(batch, self._definition.workload.edges)
        assert flow.loss is not None, "a workload without a loss"
        return flow.loss, flow.num_tokens, flow.report

    def _run(self, batch: Batch, edges: Sequence[Edge]) -> Flow:
        """All modules that have items in the batch, in the DAG's order, with what flows along these edges."""
        items = self._definition.list_items(batch)
        rows: dict[tuple[str, str], Tensor] = {}
        total: Tensor | None = None
        num_tokens = 0.0
        report: dict[str, Tensor] = {}
        for module in self._definition.workload.modules:
            if module.name not in items or not len(items[module.name]):
                continue
            shard = shard_of(ALONE, range(len(items[module.name])), items[module.name].tokens)
            ends_here = {e: self._definition.list_links(e, batch) for e in edges if e.target == module.name}
            begins_here = {e: self._definition.list_links(e, batch) for e in edges if e.source == module.name}
            made = {e: link for e, link in ends_here.items() if (e.source, e.target) in rows}
            inputs = StageInputs(
                shard=shard,
                tensors=self._definition.select_inputs(module.name, batch, shard),
                imports={e.source: rows[e.source, e.target] for e in made},
                imports_at={e.source: _place(k.target_items, k.target_starts, k.rows) for e, k in made.items()},
                exports_at={e.target: _place(k.source_items, k.source_starts, k.rows) for e, k in begins_here.items()},
            )
            output = self.modules[module.name](inputs)
            rows |= {(module.name, target): exported for target, exported in output.exports.items()}
            if output.loss is not None:
                total = output.loss if total is None else total + output.loss
                num_tokens += float(output.num_tokens)
                report |= dict(output.report)
        return Flow(loss=total, num_tokens=num_tokens, report=report, rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What a batch came to. `rows`: by (source, target), those that left a module."""

    loss: Tensor | None
    num_tokens: float
    report: dict[str, Tensor]
    rows: dict[tuple[str, str], Tensor]


def _distance(nearby: Sequence[np.ndarray], gradient: np.ndarray) -> float:
    """Median of the differences' 2-norms: one is small by chance, another large, where a token changes its expert."""
    return statistics.median(norm(near - gradient) for near in nearby)


def _place(items: Integers, starts: Integers, rows: Integers) -> Place:
    tokens, owners = rows_of(items, starts, rows)
    return torch.from_numpy(tokens), torch.from_numpy(owners)
