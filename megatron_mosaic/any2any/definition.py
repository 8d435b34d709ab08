"""A ViT-GPT-generator model of any Workload as the runtime sees it: a ModelDefinition.

A batch is a flat dict of tensors. For the backbone: `tokens`, `labels`, `loss_mask` [samples, S]. For another module m:

    m/samples [n]   whose each item is, ascending            m/values  [n, T, input_size]  padded
    m/tokens  [n]   how many tokens it has                   m/targets [n, T, output_size] of a generator

and for every edge a>b a table `a>b` [5, links] in the order of batch.Links' fields.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_mosaic.any2any.blocks import config_from_args
from megatron_mosaic.any2any.positions import Positions
from megatron_mosaic.any2any.stages import BackboneStage, ItemStage
from megatron_mosaic.definition import Batch
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard, integers
from megatron_mosaic.plan import ModulePlan
from megatron_mosaic.plan.tasks.task import LossKind
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

BuildConfig = Callable[[ModuleConfig, ModulePlan], TransformerConfig]


class Any2Any:
    """Encoders, a GPT and generators as a ModelDefinition."""

    def __init__(
        self,
        workload: Workload,
        *,
        build_config: BuildConfig,
        generator_loss_weight: float = 1.0,
        mean_over_samples: bool = False,
        positions: Positions | None = None,
    ) -> None:
        self.workload = workload
        self._build_config = build_config
        self._generator_loss_weight = generator_loss_weight
        self._mean_over_samples = mean_over_samples
        self._positions = positions or Positions()
        generators = [module.name for module in workload.modules if module.role is Role.generator]
        self.loss_names = ("lm loss", *(f"{name} loss" for name in generators))

    @classmethod
    def from_args(cls, args: Namespace, workload: Workload) -> Any2Any:
        """The model of Megatron's arguments together with those of `add_any2any_arguments`."""
        return cls(
            workload,
            build_config=partial(config_from_args, args),
            generator_loss_weight=args.generator_loss_weight,
            mean_over_samples=args.loss_mean_over == "samples",
            positions=Positions.from_args(args),
        )

    def build_stage(
        self, module: str, placed: ModulePlan, stage: int, pg_collection: ProcessGroupCollection, chunk: int = 0
    ) -> MegatronModule:
        assert pg_collection.pp.rank() == stage, "the layers to build are counted from the pp group's rank"
        sizes, layout = self.workload.by_name[module], placed.layout
        is_first, is_last = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pp - 1, layout.vpp - 1)
        config = self._build_config(sizes, placed)
        if sizes.role is Role.backbone:
            return BackboneStage(
                config,
                sizes,
                is_first=is_first,
                is_last=is_last,
                chunk=chunk,
                pg_collection=pg_collection,
                positions=self._positions,
            )
        return ItemStage(
            config,
            sizes,
            (*self.workload.edges, *loss_edges(self.workload)),
            is_first=is_first,
            is_last=is_last,
            chunk=chunk,
            pg_collection=pg_collection,
            loss_weight=self._generator_loss_weight,
        )

    def list_items(self, batch: Batch) -> dict[str, Items]:
        """Of a task, of the modules that it uses."""
        items = {}
        for module in self.workload.modules:
            name = module.name
            if module.role is Role.backbone and "tokens" in batch:
                num_samples, length = batch["tokens"].shape
                items[name] = Items(np.arange(num_samples), np.full(num_samples, length))
            elif f"{name}/samples" in batch:
                samples, tokens = batch[f"{name}/samples"], batch[f"{name}/tokens"]
                items[name] = Items(integers(samples.numpy()), integers(tokens.numpy()))
        return items

    def list_links(self, edge: Edge, batch: Batch) -> Links:
        return Links(*map(integers, batch[f"{edge.source}>{edge.target}"].numpy()))

    def select_inputs(self, module: str, batch: Batch, shard: Shard) -> dict[str, Tensor]:
        """For the backbone `tokens`, `labels`, `weights` [items, S/cp] and `positions` [S/cp].

        For others, over this rank's tokens: `positions` [T'], `values` and `targets` [T', items, size], `weights`
        [T', items] of the loss, and over all tokens `padding` [items, 1, 1, T] (True where there is none; only if any).
        """
        items = torch.tensor(shard.items, dtype=torch.long)
        if self.workload.by_name[module].role is Role.backbone:
            tokens = torch.from_numpy(shard.cp_tokens)
            mask = batch["loss_mask"][items]
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1) if self._mean_over_samples else mask
            return {
                "tokens": batch["tokens"][items][:, tokens],
                "labels": batch["labels"][items][:, tokens],
                "weights": weights[:, tokens],
                "positions": tokens,
            }
        return self._select_item_inputs(module, batch, shard, items)

    def _select_item_inputs(self, module: str, batch: Batch, shard: Shard, items: Tensor) -> dict[str, Tensor]:
        sizes, tokens = self.workload.by_name[module], torch.from_numpy(shard.tokens)
        lengths = batch[f"{module}/tokens"][items]
        inputs = {"positions": tokens.clamp(max=sizes.tokens_per_item - 1)}
        if sizes.input_size:
            inputs["values"] = _take_tokens(batch[f"{module}/values"][items], shard.tokens)
        if int(lengths.min()) < shard.length:
            inputs["padding"] = (torch.arange(shard.length) >= lengths[:, None])[:, None, None]
        if sizes.role is Role.generator:
            weights = _weights(lengths, tokens, mean=self._mean_over_samples)
            in_cp = _weights(lengths, torch.from_numpy(shard.cp_tokens), mean=self._mean_over_samples)
            inputs |= {
                "targets": _take_tokens(batch[f"{module}/targets"][items], shard.tokens),
                "weights": weights,
                "weight_sum": in_cp.sum(dtype=torch.float64),
                "num_tokens": (in_cp > 0).sum().float(),
            }
        return inputs


def loss_edges(workload: Workload) -> tuple[Edge, ...]:
    """From each module of a contrastive loss to its task: all rows of each item, as wide as the module's output."""
    return tuple(
        Edge(source=name, target=task.name, rows_per_item=module.tokens_per_item, width=module.output_size)
        for task in workload.tasks
        if task.loss.kind is LossKind.contrastive
        for name, module in ((each, workload.by_name[each]) for each in task.loss.modules)
    )


def _take_tokens(values: Tensor, tokens: np.ndarray) -> Tensor:
    """[items, T, size] -> [tokens, items, size]; zeros behind the end, where items are padded further than the data."""
    missing = int(tokens.max()) + 1 - values.shape[1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return values[:, torch.from_numpy(tokens)].transpose(0, 1).contiguous()


def _weights(lengths: Tensor, tokens: Tensor, *, mean: bool) -> Tensor:
    """[tokens, items]: weight of each token in the loss; 0 for padding."""
    real = (tokens[:, None] < lengths).float()
    return real / lengths if mean else real
