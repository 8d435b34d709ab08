"""A batch of text in which rows of items stand: images of an encoder, in the places of tokens.

A batch has, for text, `ids`, `positions`, `is_text`, `labels`, `loss_mask` [samples, S]; and for each module of items
`rows.MODULE` [samples, S], the number of the row that stands at a token, -1 if none, `values.MODULE` [items, ...] and
`samples.MODULE` [items], whose each is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.multimodal.llava_model import IGNORE_INDEX
from torch import Tensor

from megatron_mosaic.adapters.stages import LLM, LOSS_MASK
from megatron_mosaic.definition import Batch
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard, integers

ROWS, VALUES, SAMPLES = "rows", "values", "samples"  # NAME.MODULE
# What stands where there is no token.
_FILL: Mapping[str, float] = {"ids": 0, "positions": 0, "is_text": 0, "labels": IGNORE_INDEX, LOSS_MASK: 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRows:
    """How items of a module become tokens: `rows` of each in the text, of `tokens` that the module has of it.

    `dropped` of these, class tokens, come before the rows. `merged`: the others are put together four by four.
    """

    module: str
    rows: int
    tokens: int
    dropped: int = 0
    merged: bool = False


def join_blocks(parts: Sequence[Mapping[str, Tensor]], kinds: Sequence[ItemRows]) -> Batch:
    """One batch of several blocks, each numbered by itself."""
    longest = max(part["ids"].shape[1] for part in parts)
    batch = {key: torch.cat([_padded(part[key], longest, fill) for part in parts]) for key, fill in _FILL.items()}
    starts = np.cumsum([0, *(len(part["ids"]) for part in parts)])
    for kind in kinds:
        rows, values, samples = (f"{name}.{kind.module}" for name in (ROWS, VALUES, SAMPLES))
        counts = np.cumsum([0, *(len(part[values]) for part in parts)])
        placed = [
            torch.where(part[rows] >= 0, part[rows] + int(count) * kind.rows, -1) for part, count in zip(parts, counts)
        ]
        batch[rows] = torch.cat([_padded(each, longest, -1) for each in placed])
        batch[values] = torch.cat([part[values] for part in parts])
        batch[samples] = torch.cat([part[samples] + int(start) for part, start in zip(parts, starts)])
    return batch


def list_items(batch: Batch, kinds: Sequence[ItemRows]) -> dict[str, Items]:
    """The llm's samples, as long as text and rows are together; every module's items."""
    occupied = batch["is_text"].clone()
    items = {}
    for kind in kinds:
        occupied |= batch[f"{ROWS}.{kind.module}"] >= 0
        owners = integers(batch[f"{SAMPLES}.{kind.module}"].numpy())
        items[kind.module] = Items(owners, np.full(len(owners), kind.tokens))
    ends = torch.where(occupied, 1 + torch.arange(occupied.shape[1]), 0)  # what is behind the last of them is padding
    lengths = integers(ends.amax(1).numpy())
    return {LLM: Items(np.arange(len(lengths)), lengths), **items}


def list_links(batch: Batch, kind: ItemRows) -> Links:
    """Runs of rows of one item that stand one after the other in a sample."""
    rows = batch[f"{ROWS}.{kind.module}"].numpy()
    samples, places = np.nonzero(rows >= 0)
    numbers = rows[samples, places]
    item, within = np.divmod(numbers, kind.rows)
    if not len(item):
        return Links(*(integers([]) for _ in range(5)))
    follows = (np.diff(samples) == 0) & (np.diff(places) == 1) & (np.diff(numbers) == 1) & (np.diff(item) == 0)
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    counts = np.diff(np.append(starts, len(item)))
    first = (0 if kind.merged else kind.dropped) + within[starts]
    return Links(*map(integers, (item[starts], first, samples[starts], places[starts], counts)))


def select_inputs(module: str, batch: Batch, shard: Shard, kinds: Sequence[ItemRows]) -> dict[str, Tensor]:
    """llm: [items, S/cp] of all that is text. Others: `images` [items, ...], `padding` [items, 1, 1, T] if any."""
    items = torch.tensor(shard.items, dtype=torch.long)
    for kind in kinds:
        if kind.module == module:
            inputs = {"images": batch[f"{VALUES}.{module}"][items]}
            if shard.length > kind.tokens:
                padding = torch.arange(shard.length) >= kind.tokens
                inputs["padding"] = padding.expand(len(items), 1, 1, shard.length)
            return inputs
    tokens = torch.from_numpy(shard.cp_tokens)
    inputs = {}
    for key, fill in _FILL.items():
        own = batch[key][items]
        inputs[key] = _padded(own, max(shard.length, own.shape[1]), fill)[:, tokens]
    return inputs


def _padded(values: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[1]), value=fill)
