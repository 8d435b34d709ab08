"""The part of each module that one virtual stage runs. Hidden states are [tokens, items, hidden_size].

    ItemStage      encoders and generators: values per token in, rows for other modules or values per token out
    BackboneStage  text in, rows of other modules in the places held for them, the text loss and rows out

The layers at the edges (patch projections, projectors, pixel heads) are replicated over tp. With sequence parallelism
each tp rank runs them on its own tokens, and their gradients are summed over tp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_mosaic.any2any.blocks import build_block, split_over_tp
from megatron_mosaic.any2any.positions import Positions
from megatron_mosaic.definition import StageInputs, StageOutput
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role


class ItemStage(MegatronModule):
    """Values per token (patches, audio frames, noise) and rows of other modules -> transformer -> rows, or a loss."""

    def __init__(
        self,
        config: TransformerConfig,
        module: ModuleConfig,
        edges: Sequence[Edge],
        *,
        is_first: bool,
        is_last: bool,
        chunk: int,
        pg_collection: ProcessGroupCollection,
        loss_weight: float,
    ) -> None:
        super().__init__(config)
        self.is_last, self.loss_weight, self.name = is_last, loss_weight, module.name
        self.tp_group = pg_collection.tp
        width = config.hidden_size
        if is_first:
            self.input_projection = nn.Linear(module.input_size, width) if module.input_size else None
            self.position_embeddings = nn.Embedding(module.tokens_per_item, width)
            sources = {edge.source: edge.width for edge in edges if edge.target == module.name}
            self.conditions = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sources.items()})
        self.block = build_block(
            config, AttnMaskType.no_mask, is_last=is_last, chunk=chunk, pg_collection=pg_collection
        )
        if is_last:
            targets = {edge.target: edge.width for edge in edges if edge.source == module.name}
            self.projectors = nn.ModuleDict({name: nn.Linear(width, size) for name, size in targets.items()})
            generates = module.role is Role.generator
            self.output_head = nn.Linear(width, module.output_size) if generates else None
        for part in self.children():
            if part is not self.block and part is not None:
                split_over_tp(part, config)
        if module.frozen:
            self.requires_grad_(False)
            if is_last and module.trains_projector:
                self.projectors.requires_grad_(True)

    def forward(self, inputs: StageInputs) -> StageOutput:
        hidden = inputs.hidden if inputs.hidden is not None else self._embed(inputs)
        hidden = self.block(hidden, attention_mask=inputs.tensors.get("padding"))
        if not self.is_last:
            return StageOutput(hidden=hidden)
        exports = {name: self.projectors[name](hidden[at]) for name, at in inputs.exports_at.items()}
        if self.output_head is None:
            return StageOutput(exports=exports)
        return self._with_loss(hidden, inputs.tensors, exports)

    def _embed(self, inputs: StageInputs) -> Tensor:
        positions = inputs.tensors["positions"]
        hidden = self.position_embeddings(positions)[:, None].expand(-1, len(inputs.shard.items), -1)
        if self.input_projection is not None:
            values = inputs.tensors["values"].to(self.input_projection.weight.dtype)
            hidden = hidden + self.input_projection(values)
        for source, rows in inputs.imports.items():
            condition = self.conditions[source]
            hidden = hidden.index_put(
                inputs.imports_at[source], condition(rows.to(condition.weight.dtype)), accumulate=True
            )
        return hidden.contiguous()

    def _with_loss(self, hidden: Tensor, tensors: Mapping[str, Tensor], exports: Mapping[str, Tensor]) -> StageOutput:
        """Squared error of this cp rank's tokens; with sequence parallelism, put together from the tp ranks."""
        assert self.output_head is not None
        errors = (self.output_head(hidden).float() - tensors["targets"]).square().mean(-1)
        weights = tensors["weights"]
        sums = torch.stack([(errors * weights).sum(), (errors.detach() * (weights > 0)).sum()])
        if self.config.sequence_parallel:
            sums = reduce_from_tensor_model_parallel_region(sums, group=self.tp_group)
        return StageOutput(
            exports=exports,
            loss=self.loss_weight * sums[0],
            num_tokens=tensors["weight_sum"],
            report={f"{self.name} loss": torch.stack([sums[1].detach(), tensors["num_tokens"]])},
        )


class BackboneStage(MegatronModule):
    """Text, with rows of other modules in the places held for them -> a GPT -> the text loss and rows out."""

    def __init__(
        self,
        config: TransformerConfig,
        module: ModuleConfig,
        *,
        is_first: bool,
        is_last: bool,
        chunk: int,
        pg_collection: ProcessGroupCollection,
        positions: Positions,
    ) -> None:
        super().__init__(config)
        self.is_last, self.tp_group = is_last, pg_collection.tp
        if is_first:
            self.embedding = LanguageModelEmbedding(
                config,
                module.vocab_size,
                max(positions.num_learned, module.tokens_per_item),
                position_embedding_type=positions.kind,
                tp_group=pg_collection.tp,
            )
        self.rotary, self._num_positions = positions.build_rotary(config, pg_collection.cp), module.tokens_per_item
        mask = AttnMaskType.causal if module.causal else AttnMaskType.no_mask
        self.block = build_block(config, mask, is_last=is_last, chunk=chunk, pg_collection=pg_collection)
        if is_last:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                module.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=pg_collection.tp,
            )
        if module.frozen:
            self.requires_grad_(False)

    def forward(self, inputs: StageInputs) -> StageOutput:
        hidden = inputs.hidden
        if hidden is None:
            tokens, positions = inputs.tensors["tokens"], inputs.tensors["positions"]
            hidden = self.embedding(tokens, positions.expand_as(tokens))
            for source, rows in inputs.imports.items():
                hidden = hidden.index_put(inputs.imports_at[source], rows.to(hidden.dtype))
        hidden = self.block(hidden, attention_mask=None, rotary_pos_emb=self._angles(inputs))
        if not self.is_last:
            return StageOutput(hidden=hidden)
        exports = {name: hidden[at] for name, at in inputs.exports_at.items()}
        return self._with_loss(hidden, inputs.tensors, exports)

    def _angles(self, inputs: StageInputs) -> Tensor | None:
        """[S/cp, 1, 1, rotated channels] of this cp rank's tokens, which need not follow each other."""
        if self.rotary is None:
            return None
        angles: Tensor = self.rotary.get_emb(self._num_positions)
        return angles[inputs.tensors["positions"]]

    def _with_loss(self, hidden: Tensor, tensors: Mapping[str, Tensor], exports: Mapping[str, Tensor]) -> StageOutput:
        """Cross entropy over this cp rank's tokens, weighted."""
        logits, _ = self.output_layer(hidden)
        losses = tensor_parallel.vocab_parallel_cross_entropy(
            logits.float(), tensors["labels"].transpose(0, 1).contiguous(), tp_group=self.tp_group
        )
        weights = tensors["weights"].transpose(0, 1)
        counted = weights > 0
        return StageOutput(
            exports=exports,
            loss=(losses * weights).sum(),
            num_tokens=weights.sum(dtype=torch.float64),
            report={"lm loss": torch.stack([(losses.detach() * counted).sum(), counted.sum()])},
        )
