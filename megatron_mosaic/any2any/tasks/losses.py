"""The contrastive loss: of each pair against all others of the task's step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

TEMPERATURE = 0.1


def contrastive_sum(one: Tensor, other: Tensor) -> Tensor:
    """Sum over the pairs of `one` and `other` [pairs, width] of both directions' mean cross entropy: which of all
    rows of the other side is mine (Radford et al. 2021, figure 3; the temperature is fixed here)."""
    logits = normalize(one.float(), dim=1) @ normalize(other.float(), dim=1).T / TEMPERATURE
    mine = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, mine, reduction="sum") + cross_entropy(logits.T, mine, reduction="sum")) / 2


def mean_rows(rows: Tensor, lengths: Tensor) -> Tensor:
    """[items, width]: the mean of each item's rows; `rows` [all rows, width], item after item, `lengths` of each."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums = torch.zeros(len(lengths), rows.shape[1], dtype=rows.dtype).index_add(0, owner, rows)
    return sums / lengths[:, None]
