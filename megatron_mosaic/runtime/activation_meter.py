"""Bytes that autograd keeps between a forward and its backward, per module: measured, not estimated."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor


class ActivationMeter:
    """Counts what each forward saves for its backward and tracks the peak over live units.

    Two saved views of one storage count once; parameters do not count.
    """

    def __init__(self) -> None:
        self.peak_bytes: dict[str, int] = {}
        self._live: dict[str, dict[Hashable, int]] = {}
        self._parameters: set[int] = set()

    def ignore(self, module: torch.nn.Module) -> None:
        """Do not count this module's parameters."""
        self._parameters.update(parameter.untyped_storage().data_ptr() for parameter in module.parameters())

    @contextlib.contextmanager
    def forward(self, module: str, unit: Hashable, kept: Iterable[Tensor] = ()) -> Iterator[None]:
        """Count what the body saves, and `kept` besides, as one live unit of the module."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        live = self._live.setdefault(module, {})
        live[unit] = sum(storages.values())
        self.peak_bytes[module] = max(self.peak_bytes.get(module, 0), sum(live.values()))

    def backward(self, module: str, unit: Hashable) -> None:
        """The unit's activations are gone."""
        self._live[module].pop(unit)
