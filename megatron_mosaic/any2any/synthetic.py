"""Made-up data for any Workload: nothing to learn, everything that can go wrong in a layout.

Items of any length, samples without any item, unequal loss masks, rows that two modules read. Sample i is a pure
function of (seed, split, i), so every rank and every plan sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

Sample = Mapping[str, NDArray[np.generic]]
SPLITS = ("train", "valid", "test")
_LOSS_FRAC = (0.1, 0.9)  # share of a sample's tokens that count, between these


class SyntheticDataset(Dataset[Sample]):
    """`num_samples` samples of a workload: text, items of every other module, and what links them."""

    def __init__(self, split: str, *, workload: Workload, num_samples: int, seed: int) -> None:
        validate_trainable(workload)
        self.workload, self.num_samples = workload, num_samples
        self._seed = [seed, SPLITS.index(split)]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, idx: int) -> Sample:
        """`tokens`, `loss_mask` [S]; `m/tokens` [n], `m/values`, `m/targets` of each item; `a>b` [5, links]."""
        if not 0 <= idx < self.num_samples:
            raise IndexError(idx)
        rng = np.random.default_rng([*self._seed, idx])
        backbone = self.workload.backbone
        length = backbone.tokens_per_item
        sample: dict[str, NDArray[np.generic]] = {
            "tokens": rng.integers(0, backbone.vocab_size, length + 1),
            "loss_mask": (rng.random(length) < rng.uniform(*_LOSS_FRAC)).astype(np.float32),
        }
        for module in self.workload.modules:
            if module.role is not Role.backbone:
                sample |= _draw_items(rng, module)
        taken = 0
        for edge in self.workload.edges:
            name = f"{edge.source}>{edge.target}"
            if backbone.name in (edge.source, edge.target):
                sample[name], taken = _place_items(rng, edge, backbone, sample, taken)
            else:
                sample[name] = _pair_items(rng, edge, sample)
        return sample


def validate_trainable(workload: Workload) -> None:
    """ConfigError unless the model can be built and its rows fit together."""
    if not workload.backbone.vocab_size:
        raise ConfigError(
            f"workload {workload.name!r}: vocab_size", got=0, expected="a vocabulary", fix="set the backbone's"
        )
    for edge in workload.edges:
        for end in (edge.source, edge.target):
            module = workload.by_name[end]
            if module.role is Role.backbone and edge.width != module.hidden_size:
                raise ConfigError(
                    f"edge {edge.source}->{edge.target}: width",
                    got=edge.width,
                    expected=f"{module.hidden_size}, the hidden size of {end}",
                    fix="correct the width: rows enter and leave the backbone's hidden states",
                )


def collate(workload: Workload) -> Callable[[Sequence[Sample]], dict[str, Tensor]]:
    """The function that makes a batch, with the keys of definition.py, of samples of this workload."""

    def collate_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
        tokens = np.stack([sample["tokens"] for sample in samples])
        batch: dict[str, NDArray[np.generic]] = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": np.stack([sample["loss_mask"] for sample in samples]),
        }
        offsets = {workload.backbone.name: np.arange(len(samples))}
        for module in workload.modules:
            if module.role is not Role.backbone:
                counts = [len(sample[f"{module.name}/tokens"]) for sample in samples]
                offsets[module.name] = np.cumsum([0, *counts])[:-1]
                batch[f"{module.name}/samples"] = np.repeat(np.arange(len(samples)), counts)
                for key in ("tokens", "values", "targets"):
                    if f"{module.name}/{key}" in samples[0]:
                        batch[f"{module.name}/{key}"] = np.concatenate([s[f"{module.name}/{key}"] for s in samples])
        for edge in workload.edges:
            name = f"{edge.source}>{edge.target}"
            shifted = []
            for i, sample in enumerate(samples):
                shift = np.array([offsets[edge.source][i], 0, offsets[edge.target][i], 0, 0])
                shifted.append(sample[name] + shift[:, None])
            batch[name] = np.concatenate(shifted, axis=1)
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}

    return collate_samples


def _draw_items(rng: np.random.Generator, module: ModuleConfig) -> dict[str, NDArray[np.generic]]:
    """As many items as the workload says in the mean, of 1 to tokens_per_item tokens."""
    most, size = math.ceil(2 * module.items_per_sample), module.tokens_per_item
    count = int(rng.binomial(most, module.items_per_sample / most))
    items: dict[str, NDArray[np.generic]] = {f"{module.name}/tokens": rng.integers(1, size + 1, count)}
    if module.input_size:
        items[f"{module.name}/values"] = rng.standard_normal((count, size, module.input_size), dtype=np.float32)
    if module.role is Role.generator:
        items[f"{module.name}/targets"] = rng.standard_normal((count, size, module.output_size), dtype=np.float32)
    return items


def _place_items(
    rng: np.random.Generator, edge: Edge, backbone: ModuleConfig, sample: Sample, taken: int
) -> tuple[NDArray[np.int64], int]:
    """Links [5, n] between items and places of the text that no other row has taken, and where the next may start."""
    into = edge.target == backbone.name
    tokens = sample[f"{edge.source if into else edge.target}/tokens"]
    columns = []
    for item, count in enumerate(tokens.tolist()):
        start = taken + int(rng.integers(0, 3))
        rows = min(count, backbone.tokens_per_item - start)
        if rows <= 0:
            break
        taken = start + rows
        columns.append([item, 0, 0, start, rows] if into else [0, start, item, 0, rows])
    return np.array(columns, dtype=np.int64).reshape(-1, 5).T, taken


def _pair_items(rng: np.random.Generator, edge: Edge, sample: Sample) -> NDArray[np.int64]:
    """Links [5, n]: every target item reads the end of some source item; a source may have several readers."""
    sources, targets = sample[f"{edge.source}/tokens"], sample[f"{edge.target}/tokens"]
    columns = []
    for item, count in enumerate(targets.tolist() if len(sources) else []):
        source = int(rng.integers(len(sources)))
        rows = min(count, int(sources[source]))
        columns.append([source, int(sources[source]) - rows, item, 0, rows])
    return np.array(columns, dtype=np.int64).reshape(-1, 5).T
