"""Writes what a rank holds, as it stands: nothing is gathered or summed for it.

plain optimizer         whole gradients of slices, by the first of the ranks that hold the same
distributed optimizer   the shards that its reduce-scatter left on each rank: what this rank steps
parameters              by every rank, replicas too
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import ModuleOptimizers
from megatron_mosaic.parallel_state_ext.optimizers.shards import list_shards
from megatron_mosaic.runtime.dumps.place import Place
from megatron_mosaic.runtime.model import MosaicModel, module_of
from megatron_mosaic.runtime.parameters import cut_of, is_first_of_tp, is_first_replica, whole_name


class Dump:
    """The files of one rank in a directory. `_step` is the next to write."""

    def __init__(self, directory: str, rank: int) -> None:
        self._directory, self._rank = Path(directory), rank
        self._directory.mkdir(parents=True, exist_ok=True)
        self._step = 0

    def write_gradients(self, model: MosaicModel, optimizers: ModuleOptimizers) -> None:
        """The gradients that the optimizers are about to use: `step-STEP-rank-RANK.npz`."""
        arrays: dict[str, np.ndarray] = {}
        shards = {name: list_shards(optimizer) for name, optimizer in optimizers.by_module.items()}
        for module, stage, name, parameter in _parameters(model):
            if not parameter.requires_grad:
                continue
            of_module, flat = shards[module], parameter.main_grad.reshape(-1)
            if of_module is None:
                start, own = 0, flat if is_first_replica(stage, name, parameter) else flat[:0]
            else:
                shard = of_module.get(parameter, slice(0, 0))
                start, own = shard.start, flat[shard] if is_first_of_tp(stage, name, parameter) else flat[:0]
            if len(own):
                arrays |= _placed(module, stage, name, parameter, own, start)
        self._save(f"step-{self._step:04d}", arrays)
        self._step += 1

    def write_parameters(self, model: MosaicModel) -> None:
        """All parameters: `parameters-rank-RANK.npz`."""
        arrays: dict[str, np.ndarray] = {}
        for module, stage, name, parameter in _parameters(model):
            arrays |= _placed(module, stage, name, parameter, parameter.detach().reshape(-1), 0)
        self._save("parameters", arrays)

    def _save(self, what: str, arrays: Mapping[str, np.ndarray]) -> None:
        np.savez(self._directory / f"{what}-rank-{self._rank:05d}.npz", **arrays)  # type: ignore[arg-type]


def _parameters(model: MosaicModel) -> Iterator[tuple[str, MegatronModule, str, nn.Parameter]]:
    for key, wrapped in model.stages.items():
        for name, parameter in wrapped.module.named_parameters():
            yield module_of(key), wrapped.module, name, parameter


def _placed(
    module: str, stage: MegatronModule, name: str, parameter: nn.Parameter, values: Tensor, start: int
) -> dict[str, np.ndarray]:
    place = Place(
        name=f"{module}/{whole_name(stage, name)}",
        cut=cut_of(stage, name, parameter),
        shape=tuple(parameter.shape),
        start=start,
    )
    return {place.key: values.float().cpu().numpy()}
