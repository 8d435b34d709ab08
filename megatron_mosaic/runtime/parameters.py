"""What a rank's parameter is in the whole module: its name there, and which slice of the whole tensor it holds.

A whole tensor is cut along one dim over the tp ranks (expert-tp ranks, for experts). The first matrix of a gated MLP is
two matrices on top of each other, each cut by itself: `pieces` is 2 for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from numpy.typing import NDArray
from torch import Tensor, nn

_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")
_EXPERT = re.compile(r"^(.*\blocal_experts)\.(\d+)\.(.*)$")
_GATED = re.compile(r"linear_fc1\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class Cut:
    """Slice number `rank` of `size` along `dim`, of each of `pieces` equal parts of the whole."""

    dim: int
    rank: int
    size: int
    pieces: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """This rank's slice."""
        parts = whole.chunk(self.pieces, self.dim)
        return _concatenated([part.chunk(self.size, self.dim)[self.rank] for part in parts], self.dim)

    def whole_shape(self, shape: Sequence[int]) -> list[int]:
        """Shape of the whole tensor whose slices have this shape."""
        return [size * self.size if dim == self.dim else size for dim, size in enumerate(shape)]


def put_together(slices: Sequence[NDArray[np.float32]], dim: int, pieces: int) -> NDArray[np.float32]:
    """The whole tensor from all of its slices, in order."""
    split = [np.split(part, pieces, axis=dim) for part in slices]
    return np.concatenate([part[piece] for piece in range(pieces) for part in split], axis=dim)


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one expert of a mixture."""
    return _EXPERT.match(name) is not None


def whole_name(stage: MegatronModule, name: str) -> str:
    """The parameter's name in the module that is not cut into pipeline stages or groups of experts.

    A transformer layer knows its number in the whole module (`layer_number`, from 1); experts are dealt to the ep ranks
    in blocks.
    """
    expert = _EXPERT.match(name)
    if expert is not None:
        num_local = len(stage.get_submodule(expert[1]))  # type: ignore[arg-type]
        name = f"{expert[1]}.{int(expert[2]) + groups_of(stage).ep.rank() * num_local}.{expert[3]}"
    layer = _LAYER.match(name)
    if layer is None:
        return name
    number = getattr(stage.get_submodule(f"{layer[1]}.{layer[2]}"), "layer_number", None)
    return name if number is None else f"{layer[1]}.{number - 1}.{layer[3]}"


def cut_of(stage: MegatronModule, name: str, parameter: nn.Parameter) -> Cut | None:
    """Which slice of the whole tensor the parameter is; None if it is whole."""
    groups = groups_of(stage)
    group = groups.expt_tp if is_expert(name) else groups.tp
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return None
    gated = stage.config.gated_linear_unit and _GATED.search(name) is not None
    return Cut(parameter.partition_dim, group.rank(), group.size(), 2 if gated else 1)


def is_first_replica(stage: MegatronModule, name: str, parameter: nn.Parameter) -> bool:
    """Whether this rank is the first of all that hold the same slice."""
    groups = groups_of(stage)
    copies = groups.expt_dp if is_expert(name) else groups.dp_cp
    return copies.rank() == 0 and is_first_of_tp(stage, name, parameter)


def is_first_of_tp(stage: MegatronModule, name: str, parameter: nn.Parameter) -> bool:
    """Whether this rank is the first of the tp ranks that hold the same slice: all do, where it is not cut."""
    replicated = not is_expert(name) and cut_of(stage, name, parameter) is None
    return not (replicated and groups_of(stage).tp.rank())


def groups_of(stage: MegatronModule) -> ProcessGroupCollection:
    """The process groups of the stage's module."""
    return stage.pg_collection


def _concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
