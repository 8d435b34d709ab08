"""Attention whose tokens are split over cp ranks, for where Transformer Engine is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class ContextParallelAttention(DotProductAttention):
    """Attention of this cp rank's queries to the keys of all: keys and values are gathered, their gradients scattered.

    A rank's tokens are chunks r and 2*cp-1-r of 2*cp (batch.Shard).
    """

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any):
        alone = replace(config, context_parallel_size=1)
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self._cp = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query, key, value [S/cp, N, heads, size]; `attention_mask` [N, 1, 1, S], True where a key is padding."""
        mask = attention_mask
        if (attn_mask_type or self.attn_mask_type) is AttnMaskType.causal:
            later = self._later_keys(len(key) * self._cp.size(), key.device)
            mask = later if mask is None else mask | later
        return super().forward(
            query, self._gather(key), self._gather(value), mask, attn_mask_type=AttnMaskType.no_mask, **kwargs
        )

    def _gather(self, own: Tensor) -> Tensor:
        """[S, ...] in the order of tokens, from every cp rank's [S/cp, ...]."""
        size = self._cp.size()
        pieces = gather_from_sequence_parallel_region(own, group=self._cp).chunk(2 * size)
        return torch.cat([*pieces[0::2], *reversed(pieces[1::2])])

    def _later_keys(self, length: int, device: torch.device) -> Tensor:
        """[1, 1, S/cp, S]: True where the key comes after the query."""
        positions = torch.arange(length, device=device)
        chunks = positions.chunk(2 * self._cp.size())
        own = torch.cat([chunks[self._cp.rank()], chunks[-1 - self._cp.rank()]])
        return (positions > own[:, None])[None, None]
