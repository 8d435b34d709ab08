"""How the backbone knows where a token stands: a learned row each, rotated queries and keys, or not at all."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig

from megatron_mosaic.any2any.sizes import require_rotated_channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """`num_learned`: rows of the learned table; 0: one for each token of an item. Others as Megatron's arguments."""

    kind: str = "learned_absolute"  # or rope, none
    num_learned: int = 0
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    interpolation_factor: int | None = None
    scaling: bool = False
    scaling_factor: float = 8.0

    @classmethod
    def from_args(cls, args: Namespace) -> Positions:
        """As Megatron's validated arguments say."""
        return cls(
            kind=args.position_embedding_type,
            num_learned=args.max_position_embeddings,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            interpolation_factor=args.rotary_seq_len_interpolation_factor,
            scaling=args.use_rope_scaling,
            scaling_factor=args.rope_scaling_factor,
        )

    def build_rotary(self, config: TransformerConfig, cp: dist.ProcessGroup) -> RotaryEmbedding | None:
        """Angles of every position; None unless queries and keys are rotated."""
        if self.kind != "rope":
            return None
        require_rotated_channels(config.kv_channels, self.rotary_percent)
        return RotaryEmbedding(
            config.kv_channels,
            self.rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            seq_len_interpolation_factor=self.interpolation_factor,
            rotary_base=self.rotary_base,
            rope_scaling=self.scaling,
            rope_scaling_factor=self.scaling_factor,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=cp,
        )
