"""The losses of a step as one row of sums, so that a single all-reduce completes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mosaic.parallel_state_ext.rebound.cpu import device


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """[2 + 2 * len(names)]: loss tokens, the weighted sum that is trained, then (sum, count) of every named loss."""

    names: tuple[str, ...]

    def zeros(self) -> Tensor:
        """Nothing yet."""
        return torch.zeros(2 + 2 * len(self.names), dtype=torch.float64, device=device())

    def of(self, loss: Tensor, num_tokens: float | Tensor, report: Mapping[str, Tensor]) -> Tensor:
        """What one forward adds. `report`: name -> (sum, count)."""
        row = self.zeros()
        row[0] = num_tokens
        row[1] = loss.detach()
        for index, name in enumerate(self.names):
            if name in report:
                row[2 + 2 * index : 4 + 2 * index] = report[name].detach()
        return row

    def divisor(self, totals: Tensor) -> float:
        """Of all gradients: the loss tokens; 1 where there are none."""
        return float(totals[0]) or 1.0

    def means(self, totals: Tensor) -> dict[str, float]:
        """`loss`, which is trained, and every named loss, each over its own tokens."""
        pairs = totals[2:].view(-1, 2).tolist()
        named = {name: total / count if count else 0.0 for name, (total, count) in zip(self.names, pairs, strict=True)}
        return {"loss": float(totals[1]) / self.divisor(totals), **named}

    def as_reported(self, totals: Tensor) -> dict[str, Tensor]:
        """[sum, count] of every named loss, as Megatron's loop wants them."""
        pairs = totals[2:].view(-1, 2).tolist()
        rows = ((total, max(count, 1.0)) for total, count in pairs)
        return {name: torch.tensor(row, dtype=torch.float32, device=device()) for name, row in zip(self.names, rows)}
