"""By how much ranks that compute at the same time slow each other down: a part of `mosaic calibrate`.

More ranks than cores take turns; and ranks on cores of their own share caches, memory and often execution units.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from megatron_mosaic.plan.workload import ModuleConfig

ROUNDS = 31
ITEMS = 4


def measure_crowding(module: ModuleConfig) -> list[dict[str, float]]:
    """Points of `Profile.crowding`: forwards and backwards of such a layer, on 1, 2, ... all ranks at once. Collective
    over all ranks."""
    torch.manual_seed(dist.get_rank())
    layer = torch.nn.TransformerEncoderLayer(module.hidden_size, module.num_heads, module.ffn_hidden_size, dropout=0.0)
    states = torch.randn(module.tokens_per_item, ITEMS, module.hidden_size, requires_grad=True)
    calls = _calls_of(layer, states)
    seconds = [_seconds_of(layer, states, calls, num_ranks) for num_ranks in range(1, dist.get_world_size() + 1)]
    slowest, points = 1.0, list[dict[str, float]]()
    for num_ranks, taken in enumerate(seconds[1:], start=2):
        slowest = max(slowest, taken / seconds[0])  # less company never slows down: another process was in the way
        points.append({"ranks": num_ranks, "slow_down": slowest})
    return points


def _calls_of(layer: torch.nn.Module, states: torch.Tensor) -> int:
    """As many as take rank 0 some 20 ms."""
    for _ in range(3):
        started = time.perf_counter()
        _compute(layer, states)
        taken = time.perf_counter() - started
    agreed = torch.tensor([max(1, round(0.02 / taken))])
    dist.broadcast(agreed, 0)
    return int(agreed)


def _seconds_of(layer: torch.nn.Module, states: torch.Tensor, calls: int, num_ranks: int) -> float:
    """Median over rounds of the mean over the ranks that compute."""
    found = []
    for _ in range(ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        for _ in range(calls if dist.get_rank() < num_ranks else 0):
            _compute(layer, states)
        taken = torch.tensor([time.perf_counter() - started if dist.get_rank() < num_ranks else 0.0])
        dist.all_reduce(taken)
        found.append(float(taken) / num_ranks)
    return statistics.median(found)


def _compute(layer: torch.nn.Module, states: torch.Tensor) -> None:
    layer(states).sum().backward()
