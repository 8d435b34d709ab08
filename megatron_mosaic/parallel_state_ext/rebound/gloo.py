"""What NCCL can and gloo cannot: collectives over pieces of different sizes (experts' tokens). Installed by cpu.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """Let `dist.all_gather` and `dist.reduce_scatter` take pieces of different sizes."""
    dist.all_gather = _uneven_all_gather(dist.all_gather)
    dist.reduce_scatter = _uneven_reduce_scatter(dist.reduce_scatter)


def _uneven_all_gather(even: Callable[..., Any]) -> Callable[..., Any]:
    def all_gather(
        pieces: Sequence[Tensor], own: Tensor, group: Any = None, async_op: bool = False
    ) -> dist.Work | None:
        """As torch's; pieces of different sizes travel padded to the longest."""
        sizes = [len(piece) if piece.dim() else 1 for piece in pieces]
        if len(set(sizes)) == 1 or async_op:
            return even(list(pieces), own, group=group, async_op=async_op)  # type: ignore[no-any-return]
        padded = [own.new_empty(max(sizes), *own.shape[1:]) for _ in pieces]
        mine = own.new_zeros(max(sizes), *own.shape[1:])
        mine[: len(own)] = own
        even(padded, mine, group=group)
        for piece, size, got in zip(pieces, sizes, padded, strict=True):
            piece.copy_(got[:size])
        return None

    return all_gather


def _uneven_reduce_scatter(even: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_scatter(
        output: Tensor, pieces: Sequence[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> dist.Work | None:
        """As torch's; pieces of different sizes are all-reduced together and each rank keeps its own."""
        if len({len(piece) for piece in pieces}) == 1 or async_op:
            return even(output, list(pieces), op=op, group=group, async_op=async_op)  # type: ignore[no-any-return]
        together = torch.cat(list(pieces))
        dist.all_reduce(together, op=op, group=group)
        rank = dist.get_rank(group)
        first = sum(len(piece) for piece in pieces[:rank])
        output.copy_(together[first : first + len(pieces[rank])])
        return None

    return reduce_scatter
