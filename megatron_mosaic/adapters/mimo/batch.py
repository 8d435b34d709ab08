"""Blocks of a script whose model is a MimoModel: its ids already hold a special token for every row of an item.

The k-th token of a modality, over the whole microbatch in order, is row k of what its encoder makes of all items
(`MimoModel.align_embeddings_by_token_positions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mosaic.adapters.batches.reader import not_exact, on_host
from megatron_mosaic.adapters.batches.tokens import ROWS, SAMPLES, VALUES, ItemRows
from megatron_mosaic.adapters.stages import LOSS_MASK
from megatron_mosaic.errors import ConfigError

INPUT = "x"  # the images in a call of CLIPViTModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One modality: its special `token`, the name of its encoder, and the size [3, h, w] of an image."""

    items: ItemRows
    token: int
    encoder: str
    size: tuple[int, int, int]


def place_call(
    call: Mapping[str, Any], modalities: Sequence[Modality], special_tokens: Sequence[int]
) -> dict[str, Tensor]:
    """The block of one call of the model. ConfigError for arguments that the stages would ignore.

    `special_tokens`: all that are no text. The mask of attention is ignored, as MimoModel does.
    """
    if call["packing_kwargs"] is not None:
        raise not_exact("packing_kwargs", "packed sequences")
    for key in ("labels", "loss_mask"):
        if call[key] is None:
            raise not_exact(key, "None")
    ids, positions = on_host(call["input_ids"]), on_host(call["position_ids"])
    if positions is not None and positions.dim() == 3:
        raise not_exact("position_ids", f"positions of several dimensions {tuple(positions.shape)}")
    is_text = ~torch.isin(ids, torch.tensor(special_tokens, dtype=ids.dtype))
    zeros = torch.zeros_like(ids)
    block = {
        "ids": torch.where(is_text, ids, zeros),
        "positions": zeros if positions is None else torch.where(is_text, positions, zeros),
        "is_text": is_text,
        "labels": on_host(call["labels"]),
        LOSS_MASK: on_host(call["loss_mask"]).float(),
    }
    given = call["modality_inputs"] or {}
    for modality in modalities:
        block |= _place(ids, given.get(modality.items.module), modality)
    return block


def _place(ids: Tensor, given: Mapping[str, Mapping[str, Any]] | None, modality: Modality) -> dict[str, Tensor]:
    """One modality's rows, items and owners."""
    module, per_item = modality.items.module, modality.items.rows
    images = torch.zeros(0, *modality.size)
    if given:
        inputs = {key: value for key, value in given.get(modality.encoder, {}).items() if value is not None}
        if set(given) != {modality.encoder} or set(inputs) != {INPUT}:
            raise not_exact(f"modality_inputs[{module!r}]", {encoder: sorted(each) for encoder, each in given.items()})
        images = on_host(inputs[INPUT])
    is_row = ids == modality.token
    if int(is_row.sum()) != len(images) * per_item:
        raise ConfigError(
            "forward_step: the batch",
            got=f"{int(is_row.sum())} tokens {modality.token} of {module}, and {len(images)} items",
            expected=f"{per_item} tokens for each item",
            fix="correct the dataset",
        )
    rows = torch.full_like(ids, -1)
    rows[is_row] = torch.arange(len(images) * per_item, dtype=rows.dtype)
    return {
        f"{ROWS}.{module}": rows,
        f"{VALUES}.{module}": images,
        f"{SAMPLES}.{module}": torch.nonzero(is_row)[::per_item, 0],
    }
