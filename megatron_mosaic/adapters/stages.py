"""Stages of multimodal models, of upstream's own parts. Hidden states are [tokens, items, hidden_size].

    VisionStage    images -> tower -> projection -> rows for the llm
    LanguageStage  text, with rows in the places that upstream gives them -> a GPT -> the loss of every token

Upstream's own modules do the work: its CLIPViTModel is the tower, its GPTModel the decoder. What is ours is which
tokens of them a rank has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.multimodal.llava_model import pixel_shuffle
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from megatron_mosaic.definition import StageInputs, StageOutput
from megatron_mosaic.runtime.layers.norms import split_over_tp

LLM = "llm"
LOSS_MASK = "loss_mask"


class Parts(MegatronModule):
    """Named parts of a model, under the names that they have in the whole of it."""

    def __init__(self, config: TransformerConfig, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(config)
        for name, part in parts.items():
            self.add_module(name, part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """Where an image encoder's parts stand in a model, as dotted names: `encoder`, a CLIPViTModel, and `projection` of
    its rows, empty if there is none. `num_dropped`: class tokens that the llm does not see; where rows are `merged`,
    they are dropped before."""

    encoder: str
    projection: str
    num_dropped: int = 0
    merged: bool = False


class VisionStage(MegatronModule):
    """Images in, hidden states between stages, rows of the projection out."""

    def __init__(
        self, config: TransformerConfig, model: nn.Module, tower: Tower, *, is_first: bool, is_last: bool
    ) -> None:
        super().__init__(config)
        encoder: nn.Module = model.get_submodule(tower.encoder)
        if not is_first:
            _leave_layers(encoder)
        if not is_last and getattr(encoder, "ln_post", None) is not None:
            encoder.ln_post = None
        if config.context_parallel_size > 1 or config.sequence_parallel:
            for name, part in encoder.named_children():
                if name != "decoder":
                    split_over_tp(part, config)
            parameter: nn.Parameter
            for parameter in encoder.parameters(recurse=False):  # the class token
                parameter.sequence_parallel = config.sequence_parallel
        self.model = model
        self.is_first, self.is_last, self._tower = is_first, is_last, tower

    def forward(self, inputs: StageInputs) -> StageOutput:
        hidden = self._embed_and_run(inputs) if self.is_first else self._run(inputs)
        if not self.is_last:
            return StageOutput(hidden=hidden)
        if self._tower.merged:
            merged = pixel_shuffle(hidden[self._tower.num_dropped :].transpose(0, 1))
            hidden = merged.transpose(0, 1).contiguous()
        rows = self.model.get_submodule(self._tower.projection)(hidden) if self._tower.projection else hidden
        return StageOutput(exports={LLM: rows[inputs.exports_at[LLM]]})

    def _embed_and_run(self, inputs: StageInputs) -> Tensor:
        """Upstream's whole forward; before its layers, this rank's tokens are taken."""
        encoder, shard = self.model.get_submodule(self._tower.encoder), inputs.shard

        def take_own(_: nn.Module, given: tuple[Tensor, object]) -> tuple[Tensor, Tensor | None]:
            embedded, _ = given
            padded = nn.functional.pad(embedded, (0, 0, 0, 0, 0, shard.length - len(embedded)))
            return padded[torch.from_numpy(shard.tokens)].contiguous(), inputs.tensors.get("padding")

        images = inputs.tensors["images"].to(encoder.get_submodule("conv1").weight.dtype)  # Float16Module's cast
        is_split = len(shard.tokens) != shard.length or "padding" in inputs.tensors
        if not is_split:
            found: Tensor = encoder(images)
        else:
            with encoder.get_submodule("decoder").register_forward_pre_hook(take_own):
                found = encoder(images)
        return found.transpose(0, 1).contiguous()

    def _run(self, inputs: StageInputs) -> Tensor:
        encoder = self.model.get_submodule(self._tower.encoder)
        hidden: Tensor = encoder.get_submodule("decoder")(inputs.hidden, inputs.tensors.get("padding"))
        norm = getattr(encoder, "ln_post", None)
        return hidden if norm is None else norm(hidden)


def _leave_layers(tower: nn.Module) -> None:
    """Take away what stands before the layers."""
    for name, part in list(tower.named_children()):
        if name not in ("decoder", "ln_post") and part is not None:
            setattr(tower, name, None)
    if getattr(tower, "class_token", None) is not None:
        tower.class_token = None


class LanguageStage(MegatronModule):
    """Text and rows in, hidden states between stages, the loss of every token out."""

    def __init__(self, config: TransformerConfig, language_model: GPTModel, *, is_first: bool, is_last: bool) -> None:
        super().__init__(config)
        self.model = Parts(config, {"language_model": language_model})
        self.is_first, self.is_last = is_first, is_last
        self._tp = language_model.pg_collection.tp

    def forward(self, inputs: StageInputs) -> StageOutput:
        gpt, tensors = self.model.language_model, inputs.tensors
        if not self.is_first:
            gpt.set_input_tensor(inputs.hidden)
        output = gpt(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=self._embed(inputs) if self.is_first else None,
            labels=tensors["labels"] if self.is_last else None,
        )
        if not self.is_last:
            return StageOutput(hidden=output)
        return StageOutput(loss=output, report={LOSS_MASK: tensors[LOSS_MASK]})  # the script's function sums it

    def _embed(self, inputs: StageInputs) -> Tensor:
        """[T, items, hidden_size]: zeros where upstream pads, rows of images in their places."""
        tensors = inputs.tensors
        is_text = tensors["is_text"]
        hidden = self.model.language_model.embedding(input_ids=tensors["ids"], position_ids=tensors["positions"])
        hidden = hidden * is_text.transpose(0, 1).unsqueeze(-1).to(hidden.dtype)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self._tp)
        for source, rows in inputs.imports.items():
            hidden = hidden.index_put(inputs.imports_at[source], rows.to(hidden.dtype))
        return hidden.contiguous()
