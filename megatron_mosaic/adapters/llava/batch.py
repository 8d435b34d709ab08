"""Batches of a script whose model is a LLaVAModel: what its forward_step gives to the model, laid out in tokens.

    blocks --the script's forward_step, a recorder as its model--> images, ids with image tokens, labels, mask
           --upstream's own _preprocess_data, on numbers instead of embeddings--> what stands at every token

So where images go, what is cut off and which token counts is upstream's to say, for several images a sample and none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.models.multimodal.llava_model import IGNORE_INDEX, LLaVAModel
from torch import Tensor

from megatron_mosaic.adapters.llava.stages import LLM, LOSS_MASK, VISION
from megatron_mosaic.adapters.recording import CallRecorder, LossFunction
from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.definition import Batch, StageOutput
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard, integers

# What stands where there is no token.
_FILL: Mapping[str, float] = {"ids": 0, "positions": 0, "is_text": 0, "rows": -1, "labels": IGNORE_INDEX, LOSS_MASK: 0}
_OF_TEXT = ("ids", "positions", "is_text", "labels", LOSS_MASK)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRows:
    """How images become tokens: `rows` of each in the text, of `tokens` that the tower has of it.

    `dropped` of these, class tokens, come before the rows. `merged`: the others are put together four by four.
    """

    rows: int
    tokens: int
    dropped: int
    merged: bool
    image_token: int
    max_length: int


class LlavaReader:
    """The script's forward_step on every block. `_loss_function`: of the last one; the mask apart, all are the same."""

    def __init__(self, images: ImageRows, alone: SingleProcess, forward_step: Callable[..., Any]) -> None:
        self._images, self._alone, self._script_step = images, alone, forward_step
        self._loss_function: LossFunction | None = None

    def collate(self, blocks: Sequence[Any]) -> Batch:
        """`ids`, `positions`, `is_text`, `rows`, `labels`, `loss_mask` [samples, S]; `rows`: number of the image row
        that stands there, -1 if none. `images` [n, 3, h, w]; `image_samples` [n]: whose each is."""
        parts = [self._read(block) for block in blocks]
        longest = max(part["ids"].shape[1] for part in parts)
        batch = {key: torch.cat([_padded(part[key], longest, fill) for part in parts]) for key, fill in _FILL.items()}
        batch["images"] = torch.cat([part["images"] for part in parts])
        batch["image_samples"] = torch.cat([part["image_samples"] for part in parts])
        samples = images = 0
        at = 0
        for part in parts:  # numbers within a block become numbers within the batch
            count = len(part["ids"])
            rows = batch["rows"][at : at + count]
            rows += torch.where(rows >= 0, images * self._images.rows, 0)
            batch["image_samples"][images : images + len(part["images"])] += samples
            at, samples, images = at + count, samples + count, images + len(part["images"])
        return batch

    def forward_step(self, calls: Iterator[Any], model: Any) -> tuple[StageOutput, Callable[[StageOutput], Any]]:
        """One stage of one module on one unit."""
        return model(next(calls)), self._sum_losses

    def _sum_losses(self, output: StageOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert self._loss_function is not None and output.loss is not None
        with self._alone():
            loss, num_tokens, report = self._loss_function(output.report[LOSS_MASK], output.loss)
        return loss, num_tokens, {"lm loss": report["lm loss"]}

    def _read(self, block: Any) -> dict[str, Tensor]:
        """One block, numbered by itself."""
        mask = object()
        recorder = CallRecorder(LLaVAModel.forward, (object(), mask))
        with self._alone():
            _, partial = self._script_step(iter([block]), recorder)
        call = recorder.arguments
        _require_known(call, self._images.image_token)
        part = place_tokens({key: _on_host(value) for key, value in call.items()}, self._images)
        is_first, self._loss_function = self._loss_function is None, LossFunction(partial, mask)
        if is_first:
            with self._alone():
                self._loss_function.require_sums(part[LOSS_MASK])
        return part


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _require_known(call: Mapping[str, Any], image_token: int) -> None:
    """ConfigError for arguments of a model call that the stages would ignore."""
    packed = call["packed_seq_params"]
    if packed is not None and packed.qkv_format != "sbhd":
        raise _not_exact("packed_seq_params", "packed sequences")
    for key in ("vision_packed_seq_params", "attention_mask", "sound_clips", "imgs_sizes", "num_frames"):
        if call[key] is not None:
            raise _not_exact(key, "a value")
    if call["image_token_index"] not in (None, image_token):
        raise _not_exact("image_token_index", call["image_token_index"])
    for key in ("labels", "loss_mask", "images"):
        if call[key] is None:
            raise _not_exact(key, "None")


def _not_exact(key: str, got: object) -> ConfigError:
    return ConfigError(
        f"forward_step: model({key}=...)",
        got=got,
        expected="a batch of text and images with labels: nothing else is laid out exactly yet",
        fix="leave the option out that makes it",
    )


def place_tokens(call: Mapping[str, Any], images: ImageRows) -> dict[str, Tensor]:
    """What stands at every token of the combined sequences, as `LLaVAModel._preprocess_data` places it.

    It is given numbers instead of embeddings: text token i of the batch is i + 1, row j of the images is -(j + 1).
    """
    ids, num_images = call["input_ids"], len(call["images"])
    tiles = call["num_image_tiles"]
    tiles = torch.ones(num_images, dtype=torch.int) if tiles is None else torch.as_tensor(tiles, dtype=torch.int)
    is_image = ids == images.image_token
    if int(is_image.sum()) != len(tiles) or int(tiles.sum()) != num_images:
        raise ConfigError(
            "forward_step: the batch",
            got=f"{int(is_image.sum())} image tokens, {num_images} images, tiles {tiles.tolist()[:20]}",
            expected="a token for each image, and as many tiles as images are given",
            fix="correct the dataset",
        )
    text = 1 + torch.arange(ids.numel(), dtype=torch.float64).view(*ids.shape, 1)
    rows = -1 - torch.arange(num_images * images.rows, dtype=torch.float64).view(num_images, images.rows, 1)
    stage = SimpleNamespace(
        add_decoder=True,
        pre_process=True,
        post_process=True,
        img_seq_len=images.rows,
        context_parallel_lm=1,
        vision_model=None,
        _language_is_pipeline_parallel=False,
        _language_max_sequence_length=images.max_length,
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
        images.image_token,
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
        "rows": torch.where(numbers < 0, -numbers - 1, -1),
        "labels": labels,
        LOSS_MASK: mask,
        "images": call["images"],
        "image_samples": torch.nonzero(is_image)[:, 0].repeat_interleave(tiles),
    }


def _padded(values: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[1]), value=fill)


def list_items(batch: Batch, images: ImageRows) -> dict[str, Items]:
    """The llm's samples, as long as their text and images are together; the tower's images."""
    samples = len(batch["ids"])
    lengths = ((batch["rows"] >= 0) | batch["is_text"]).sum(1).numpy()
    owners = integers(batch["image_samples"].numpy())
    return {
        LLM: Items(np.arange(samples), integers(lengths)),
        VISION: Items(owners, np.full(len(owners), images.tokens)),
    }


def list_links(batch: Batch, images: ImageRows) -> Links:
    """Runs of rows of one image that stand one after the other in a sample."""
    rows = batch["rows"].numpy()
    samples, places = np.nonzero(rows >= 0)
    numbers = rows[samples, places]
    image, within = np.divmod(numbers, images.rows)
    if not len(image):
        return Links(*(integers([]) for _ in range(5)))
    follows = (np.diff(samples) == 0) & (np.diff(places) == 1) & (np.diff(numbers) == 1) & (np.diff(image) == 0)
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    counts = np.diff(np.append(starts, len(image)))
    columns = (
        image[starts],
        (0 if images.merged else images.dropped) + within[starts],
        samples[starts],
        places[starts],
        counts,
    )
    return Links(*map(integers, columns))


def select_inputs(module: str, batch: Batch, shard: Shard, images: ImageRows) -> dict[str, Tensor]:
    """llm: [items, S/cp] of all that is text. vision: `images` [items, 3, h, w], `padding` [items, 1, 1, T] if any."""
    items = torch.tensor(shard.items, dtype=torch.long)
    if module == VISION:
        inputs = {"images": batch["images"][items]}
        if shard.length > images.tokens:
            padding = torch.arange(shard.length) >= images.tokens
            inputs["padding"] = padding.expand(len(items), 1, 1, shard.length)
        return inputs
    tokens = torch.from_numpy(shard.cp_tokens)
    inputs = {}
    for key in _OF_TEXT:
        own = batch[key][items]
        inputs[key] = _padded(own, max(shard.length, own.shape[1]), _FILL[key])[:, tokens]
    return inputs
