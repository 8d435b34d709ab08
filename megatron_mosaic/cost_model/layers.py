"""Which layers a pipeline stage has: how many, and how many of them have experts.

Layers go to pieces (stage, chunk) in order: piece c * pp + s is chunk c of stage s, as in Megatron. Where they do not
divide, pieces from both ends take one less: the last, which has the loss, then the first, which has the embedding
(`--account-for-loss-in-pipeline-split` and `--account-for-embedding-in-pipeline-split`), and so on inwards.
The first `num_dense_layers` of a mixture have no experts.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.workload import ModuleConfig


@lru_cache(maxsize=4096)
def split_layers(num_layers: int, pieces: int) -> tuple[int, ...]:
    """Layers of each piece, first to last."""
    each, more = divmod(num_layers, pieces)
    sizes, spare = [each + 1] * pieces, pieces - more
    for i in range(spare):
        sizes[i // 2 if i % 2 else -1 - i // 2] -= 1
    return tuple(sizes)


@lru_cache(maxsize=4096)
def count_layers(module: ModuleConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """Layers of one stage, all its chunks together: without experts, and with. The last stage has those of multi-token
    prediction too, which are like the module's last."""
    sizes, first, dense, sparse = split_layers(module.num_layers, layout.pp * layout.vpp), 0, 0, 0
    num_dense = module.num_dense_layers if module.num_experts else module.num_layers
    for piece, size in enumerate(sizes):
        if piece % layout.pp == stage:
            without = min(max(num_dense - first, 0), size)
            dense, sparse = dense + without, sparse + size - without
        first += size
    if stage == layout.pp - 1 and module.num_experts:
        return dense, sparse + module.num_mtp_layers
    return dense + (module.num_mtp_layers if stage == layout.pp - 1 else 0), sparse
