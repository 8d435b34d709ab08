"""The reference model without this runtime: one MegatronModule that runs its stages one after the other.

What bench_step_overhead.py compares with: Megatron's own mpu, get_model, DistributedDataParallel, optimizer, schedule
without pipelining and per-token loss. Every rank computes the images of its own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args
from torch import Tensor, nn

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, workload_from_args
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.pretrain import make_collate, make_datasets
from megatron_mosaic.definition import Batch, StageInputs
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import Place
from megatron_mosaic.parallel_state_ext.boundaries.items import Links, shard_of
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Edge
from megatron_mosaic.runtime.arguments import parse_and_validate_args
from megatron_mosaic.runtime.model import initialize_by_name


class StockModel(MegatronModule):
    """vision, llm and generator, called in turn; rows go from one to the next by reference."""

    def __init__(self, definition: Any2Any, plan: Plan, args: Any) -> None:
        super().__init__(core_transformer_config_from_args(args))
        self._definition, self._plan = definition, plan
        self.pg_collection = groups = ProcessGroupCollection.use_mpu_process_groups()
        stages = {}
        for module in definition.workload.modules:
            stage = definition.build_stage(module.name, plan.modules[module.name], 0, groups)
            stage.pg_collection, stage.tp_group = groups, groups.tp
            initialize_by_name(stage, module.name, args.seed)
            stages[module.name] = stage
        self.stages = nn.ModuleDict(stages)
        self.model_type: Any = None

    def set_input_tensor(self, input_tensor: object) -> None:
        """Part of the schedule's protocol; there is one stage."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(weighted loss sum, loss tokens, what to log) of this rank's samples."""
        workload, items = self._definition.workload, self._definition.list_items(batch)
        links = {edge: self._definition.list_links(edge, batch) for edge in workload.edges}
        links = {edge: found for edge, found in links.items() if len(found)}
        rows: dict[tuple[str, str], Tensor] = {}
        losses, num_tokens = [], 0.0
        report = {name: torch.zeros(2) for name in self._definition.loss_names}
        for module in workload.modules:
            own = items[module.name]
            if not len(own):
                continue
            shard = shard_of(self._plan.modules[module.name], range(len(own)), own.tokens)
            arriving = {edge.source: edge for edge in links if edge.target == module.name}
            leaving = {edge.target: edge for edge in links if edge.source == module.name}
            inputs = StageInputs(
                shard=shard,
                tensors=self._definition.select_inputs(module.name, batch, shard),
                imports={name: rows[name, module.name] for name in arriving},
                imports_at={name: _target(edge, links) for name, edge in arriving.items()},
                exports_at={name: _source(edge, links) for name, edge in leaving.items()},
            )
            output = self.stages[module.name](inputs)
            rows |= {(module.name, name): exported for name, exported in output.exports.items()}
            if output.loss is not None:
                losses.append(output.loss)
                num_tokens += output.num_tokens
                report |= dict(output.report)
        return torch.stack(losses).sum(), torch.tensor(num_tokens, dtype=torch.int), report


def _target(edge: Edge, links: dict[Edge, Links]) -> Place:
    found = links[edge]
    return _place(found.target_items, found.target_starts, found.rows)


def _source(edge: Edge, links: dict[Edge, Links]) -> Place:
    found = links[edge]
    return _place(found.source_items, found.source_starts, found.rows)


def _place(items: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> Place:
    """(token, item) of every row, link by link."""
    tokens = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, rows, strict=True)])
    return torch.from_numpy(tokens), torch.from_numpy(np.repeat(items, rows))


def forward_step(data_iterator: Iterator[Batch], model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """One microbatch of this rank."""
    return model(next(data_iterator)), lambda output: output


def main() -> int:
    """Train the plan's layout, which all modules share, the stock way."""
    args, plan = parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)
    definition = Any2Any.from_args(args, workload_from_args(args))
    collate = make_collate(args, definition.workload)

    def read(dataset: Any) -> Iterator[Batch]:
        """This rank's block of each global microbatch."""
        size, dp = args.micro_batch_size, parallel_state.get_data_parallel_world_size()
        start = size * parallel_state.get_data_parallel_rank()
        while True:
            yield collate([dataset[i % len(dataset)] for i in range(start, start + size)])
            start += size * dp

    def provider(num_samples: Sequence[int]) -> tuple[Iterator[Batch], ...]:
        return tuple(read(dataset) for dataset in make_datasets(args, definition.workload)(num_samples))

    provider.is_distributed = True  # type: ignore[attr-defined]

    def build_model(*_: Any, **__: Any) -> StockModel:
        return StockModel(definition, plan, get_args())

    container = pretrain_cfg_container_from_args(args)
    pretrain(container, provider, ModelType.encoder_or_decoder, forward_step, build_model)
    return 0
