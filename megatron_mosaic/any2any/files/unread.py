"""A column of a batch that is in files: rows are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """Stands for a tensor [len, *row_shape] whose rows `read_row(number)` brings. `names`: of the rows."""

    row_shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]
    read_row: Callable[[int], Tensor]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.names), *self.row_shape))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """These rows, [len(rows), *row_shape]."""
        found = [self.read_row(row) for row in rows.tolist()]
        return torch.stack(found) if found else torch.zeros(0, *self.row_shape, dtype=self.dtype)

    def identity(self) -> bytes:
        """What tells these rows from others without reading them."""
        return "\n".join(self.names).encode()
