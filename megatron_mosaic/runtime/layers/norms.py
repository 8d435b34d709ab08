"""Norms that work on a tp rank's share of the tokens, for where Transformer Engine is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import nn


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> nn.Module:
    """torch's norm, its parameters marked where each tp rank sees its own tokens only."""
    plain = replace(config, sequence_parallel=False)
    norm: nn.Module = WrappedTorchNorm(plain, hidden_size, eps, **kwargs)
    return split_over_tp(norm, config)


def split_over_tp[M: nn.Module](module: M, config: TransformerConfig) -> M:
    """The module, its parameters marked for a sum over tp: with sequence parallelism each rank sees its own tokens."""
    parameter: nn.Parameter
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


class TorchNorm:
    """`build_norm` where Megatron wants a class to build: a function would be returned as it is."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> nn.Module:  # type: ignore[misc]
        return build_norm(config, hidden_size, eps, **kwargs)
