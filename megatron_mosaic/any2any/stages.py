"""The part of each module that one pipeline stage runs, from megatron-core's TransformerBlock.

Hidden states are [tokens, items, hidden_size]. The layers at the edges (patch projection, projector, pixel head,
position embeddings) are replicated over tp: their inputs and the gradients of their outputs are too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_mosaic.any2any.sizes import GENERATOR, LLM, NUM_PATCHES, PATCH_PIXELS, VISION, Any2AnySizes
from megatron_mosaic.definition import StageOutput

Tensors = Mapping[str, Tensor]


def build_block(
    config: TransformerConfig, mask: AttnMaskType, is_last: bool, pg_collection: ProcessGroupCollection
) -> TransformerBlock:
    """This pipeline stage's share of the layers, and the final norm on the last stage."""
    if HAVE_TE and config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.params["attn_mask_type"] = mask
    # pre_process=True on every stage: the hidden states are always an argument.
    return TransformerBlock(config, spec, pre_process=True, post_process=is_last, pg_collection=pg_collection)


class VisionStage(MegatronModule):
    """Patches -> a ViT -> rows as wide as the llm."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        sizes: Any2AnySizes,
        is_first: bool,
        is_last: bool,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.is_last = is_last
        if is_first:
            self.patch_projection = nn.Linear(PATCH_PIXELS, config.hidden_size)
            self.position_embeddings = nn.Embedding(NUM_PATCHES, config.hidden_size)
        self.block = build_block(config, AttnMaskType.no_mask, is_last, pg_collection)
        if is_last:
            self.projector = nn.Linear(config.hidden_size, sizes.llm.hidden_size)

    def forward(
        self, inputs: Mapping[str, Tensor], hidden: Tensor | None, imports: Mapping[str, Tensor]
    ) -> StageOutput:
        if hidden is None:
            images = inputs["images"].to(self.patch_projection.weight.dtype)
            hidden = _tokens_first(self.patch_projection(images) + self.position_embeddings.weight)
        hidden = self.block(hidden, attention_mask=None)
        if not self.is_last:
            return StageOutput(hidden=hidden)
        return StageOutput(exports={LLM: self.projector(hidden).transpose(0, 1).flatten(0, 1)})


class BackboneStage(MegatronModule):
    """Text, with image rows in the places held for them -> a GPT -> the text loss, and rows to draw from."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        sizes: Any2AnySizes,
        is_first: bool,
        is_last: bool,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.is_last = is_last
        self.tp_group = pg_collection.tp
        if is_first:
            self.embedding = LanguageModelEmbedding(
                config, sizes.vocab_size, sizes.seq_length, tp_group=pg_collection.tp
            )
        self.block = build_block(config, AttnMaskType.causal, is_last, pg_collection)
        if is_last:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                sizes.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=pg_collection.tp,
            )

    def forward(
        self, inputs: Mapping[str, Tensor], hidden: Tensor | None, imports: Mapping[str, Tensor]
    ) -> StageOutput:
        if hidden is None:
            hidden = self._embed(inputs, imports)
        hidden = self.block(hidden, attention_mask=None)
        if not self.is_last:
            return StageOutput(hidden=hidden)
        loss, num_tokens = self._sum_loss(hidden, inputs)
        return StageOutput(
            exports={GENERATOR: hidden[_places(inputs["gen_start"], inputs["gen_sample"])]},
            loss=loss,
            num_tokens=int(num_tokens),
            report={"lm loss": torch.stack([loss.detach(), num_tokens])},
        )

    def _embed(self, inputs: Tensors, imports: Tensors) -> Tensor:
        """Embedded tokens [S, N, H]; the rows imported for this lane's images replace their placeholders."""
        tokens = inputs["tokens"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.embedding(tokens, positions)
        if not len(inputs["image_start"]):
            return hidden
        return hidden.index_put(
            _places(inputs["image_start"], inputs["image_sample"]), imports[VISION].to(hidden.dtype)
        )

    def _sum_loss(self, hidden: Tensor, inputs: Tensors) -> tuple[Tensor, Tensor]:
        """Cross entropy summed over the tokens of `loss_mask`, and how many these are."""
        logits, _ = self.output_layer(hidden)
        losses = tensor_parallel.vocab_parallel_cross_entropy(
            logits.float(), inputs["labels"].transpose(0, 1).contiguous(), tp_group=self.tp_group
        )
        loss_mask = inputs["loss_mask"].float()
        return (losses * loss_mask.transpose(0, 1)).sum(), loss_mask.sum()


class GeneratorStage(MegatronModule):
    """Noisy patches and the llm's rows for them -> a ViT -> clean patches, and the pixel loss."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        sizes: Any2AnySizes,
        is_first: bool,
        is_last: bool,
        pg_collection: ProcessGroupCollection,
        loss_weight: float,
    ) -> None:
        super().__init__(config)
        self.is_last = is_last
        self.loss_weight = loss_weight
        if is_first:
            self.patch_projection = nn.Linear(PATCH_PIXELS, config.hidden_size)
            self.condition_projection = nn.Linear(sizes.llm.hidden_size, config.hidden_size)
            self.position_embeddings = nn.Embedding(NUM_PATCHES, config.hidden_size)
        self.block = build_block(config, AttnMaskType.no_mask, is_last, pg_collection)
        if is_last:
            self.pixel_head = nn.Linear(config.hidden_size, PATCH_PIXELS)

    def forward(
        self, inputs: Mapping[str, Tensor], hidden: Tensor | None, imports: Mapping[str, Tensor]
    ) -> StageOutput:
        if hidden is None:
            dtype = self.patch_projection.weight.dtype
            patches = self.patch_projection(inputs["gen_noisy"].to(dtype))
            condition = self.condition_projection(imports[LLM].to(dtype)).unflatten(0, (-1, NUM_PATCHES))
            hidden = _tokens_first(patches + condition + self.position_embeddings.weight)
        hidden = self.block(hidden, attention_mask=None)
        if not self.is_last:
            return StageOutput(hidden=hidden)
        drawn = self.pixel_head(hidden).float()
        loss = (drawn - inputs["gen_target"].transpose(0, 1)).square().mean(-1).sum()
        num_tokens = drawn.shape[0] * drawn.shape[1]
        return StageOutput(
            loss=self.loss_weight * loss,
            num_tokens=num_tokens,
            report={"generator loss": torch.stack([loss.detach(), loss.new_tensor(num_tokens)])},
        )


def _tokens_first(items_first: Tensor) -> Tensor:
    return items_first.transpose(0, 1).contiguous()


def _places(start: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """(position, sample) of every patch in [S, N, ...], item by item: for indexing with the rows of a border."""
    positions = start[:, None] + torch.arange(NUM_PATCHES, device=start.device)
    return positions.flatten(), sample.repeat_interleave(NUM_PATCHES)
