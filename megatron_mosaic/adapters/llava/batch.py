"""Blocks of a script whose model is a LLaVAModel: what its forward_step gives to the model, laid out in tokens.

    block --the script's forward_step, a recorder as its model--> images, ids with image tokens, labels, mask
          --upstream's own _preprocess_data, on numbers instead of embeddings--> what stands at every token

So where images go, what is cut off and which token counts is upstream's to say, for several images a sample and none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from torch import Tensor

from megatron_mosaic.adapters.batches.reader import not_exact, on_host
from megatron_mosaic.adapters.batches.tokens import ROWS, SAMPLES, VALUES, ItemRows
from megatron_mosaic.adapters.stages import LOSS_MASK
from megatron_mosaic.errors import ConfigError

VISION = "vision"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokens:
    """How images stand in the text: in the place of `image_token`, as `images` says; `max_length`: where it is cut."""

    images: ItemRows
    image_token: int
    max_length: int


def place_call(call: Mapping[str, Any], tokens: ImageTokens) -> dict[str, Tensor]:
    """The block of one call of the model. ConfigError for arguments that the stages would ignore."""
    _require_known(call, tokens.image_token)
    return place_tokens({key: on_host(value) for key, value in call.items()}, tokens)


def _require_known(call: Mapping[str, Any], image_token: int) -> None:
    packed = call["packed_seq_params"]
    if packed is not None and packed.qkv_format != "sbhd":
        raise not_exact("packed_seq_params", "packed sequences")
    for key in ("vision_packed_seq_params", "attention_mask", "sound_clips", "imgs_sizes", "num_frames"):
        if call[key] is not None:
            raise not_exact(key, "a value")
    if call["image_token_index"] not in (None, image_token):
        raise not_exact("image_token_index", call["image_token_index"])
    for key in ("labels", "loss_mask", "images"):
        if call[key] is None:
            raise not_exact(key, "None")


def place_tokens(call: Mapping[str, Any], tokens: ImageTokens) -> dict[str, Tensor]:
    """What stands at every token of the combined sequences, as `LLaVAModel._preprocess_data` places it.

    It is given numbers instead of embeddings: text token i of the batch is i + 1, row j of the images is -(j + 1).
    """
    per_image = tokens.images.rows
    ids, num_images = call["input_ids"], len(call["images"])
    tiles = call["num_image_tiles"]
    tiles = torch.ones(num_images, dtype=torch.int) if tiles is None else torch.as_tensor(tiles, dtype=torch.int)
    is_image = ids == tokens.image_token
    if int(is_image.sum()) != len(tiles) or int(tiles.sum()) != num_images:
        raise ConfigError(
            "forward_step: the batch",
            got=f"{int(is_image.sum())} image tokens, {num_images} images, tiles {tiles.tolist()[:20]}",
            expected="a token for each image, and as many tiles as images are given",
            fix="correct the dataset",
        )
    text = 1 + torch.arange(ids.numel(), dtype=torch.float64).view(*ids.shape, 1)
    rows = -1 - torch.arange(num_images * per_image, dtype=torch.float64).view(num_images, per_image, 1)
    stage = SimpleNamespace(
        add_decoder=True,
        pre_process=True,
        post_process=True,
        img_seq_len=per_image,
        context_parallel_lm=1,
        vision_model=None,
        _language_is_pipeline_parallel=False,
        _language_max_sequence_length=tokens.max_length,
    )
    numbers, labels, mask = LLaVAModel._preprocess_data(
        stage,
        rows.transpose(0, 1) if num_images else torch.zeros(0, 0, 1, dtype=torch.float64),
        text,
        ids,
        call["loss_mask"],
        call["labels"],
        False,
        None,
        tokens.image_token,
        tiles,
    )
    numbers = numbers[..., 0].transpose(0, 1).long()  # [samples, S]
    is_text = numbers > 0
    at = (numbers - 1).clamp(min=0)
    positions = call["position_ids"]
    return {
        "ids": torch.where(is_text, ids.reshape(-1)[at], 0),
        "positions": torch.where(is_text, positions.reshape(-1)[at], 0),
        "is_text": is_text,
        "labels": labels,
        LOSS_MASK: mask,
        f"{ROWS}.{VISION}": torch.where(numbers < 0, -numbers - 1, -1),
        f"{VALUES}.{VISION}": call["images"],
        f"{SAMPLES}.{VISION}": torch.nonzero(is_image)[:, 0].repeat_interleave(tiles),
    }
