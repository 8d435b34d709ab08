"""Global batches drawn from a workload's histograms: which sample brings how many items of how many tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, Items
from megatron_mosaic.plan.workload import ModuleConfig, Workload

Batch = tuple[Mapping[str, Items], ...]  # by microbatch: what it brings to each module


def varies(workload: Workload) -> bool:
    """Whether any module knows more of its data than means."""
    return any(module.items_histogram or module.tokens_histogram for module in workload.modules)


def draw_batch(workload: Workload, num_microbatches: int, samples_each: int, generator: np.random.Generator) -> Batch:
    """Items of every microbatch. All numbers are drawn independently: of items, and of tokens. Where only a mean is
    known, samples take turns so that it holds, and every item has its tokens.

    A generator in the same state brings the same samples, however they are cut into microbatches.
    """
    found: list[dict[str, Items]] = [{} for _ in range(num_microbatches)]
    for module in workload.modules:
        counts = _count_items(module, num_microbatches * samples_each, generator)
        tokens = _count_tokens(module, int(counts.sum()), generator)
        ends = np.concatenate([[0], counts.cumsum()])[::samples_each]
        for items, own, start, stop in zip(found, counts.reshape(num_microbatches, -1), ends, ends[1:]):
            items[module.name] = Items(samples=np.arange(samples_each).repeat(own), tokens=tokens[start:stop])
    return tuple(found)


def _count_items(module: ModuleConfig, num_samples: int, generator: np.random.Generator) -> Integers:
    """Of each sample."""
    known = module.items_histogram
    if known:
        return generator.choice(np.array(known.values), size=num_samples, p=known.shares)
    so_far = np.floor(np.arange(num_samples + 1) * module.items_per_sample + 1e-9).astype(np.int64)
    return np.diff(so_far)


def _count_tokens(module: ModuleConfig, num_items: int, generator: np.random.Generator) -> Integers:
    """Of each item."""
    known = module.tokens_histogram
    if known:
        return generator.choice(np.array(known.values), size=num_items, p=known.shares)
    return np.full(num_items, module.tokens_per_item, dtype=np.int64)
