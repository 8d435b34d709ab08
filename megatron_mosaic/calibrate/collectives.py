"""Seconds of gloo's collectives and messages on this machine, over bytes and ranks: a part of `mosaic calibrate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mosaic.cost_model.hardware.profile import Operation

MESSAGE_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 21)
ROUNDS = 21


def measure_collectives(flag: Path) -> dict[str, dict[int, list[dict[str, float]]]]:
    """operation -> ranks -> points. Collective over all ranks. `flag`: a file that does not exist yet."""
    table: dict[str, dict[int, list[dict[str, float]]]] = {operation.value: {} for operation in Operation}
    for num_ranks in range(2, dist.get_world_size() + 1):
        group = dist.new_group(list(range(num_ranks)))
        if dist.get_rank() < num_ranks:
            for operation in (Operation.all_reduce, Operation.all_gather, Operation.reduce_scatter):
                table[operation][num_ranks] = _points(_time_collective(operation, group, num_ranks))
        dist.barrier()
        if dist.get_rank() < num_ranks:
            dist.destroy_process_group(group)
    table[Operation.p2p][2] = _points(_time_messages(flag))
    return table


def _points(seconds: Sequence[float]) -> list[dict[str, float]]:
    """Rounds of one time per size -> the median of each size. In rounds, so that a bad moment meets all sizes alike."""
    rounds = np.array(seconds).reshape(-1, len(MESSAGE_BYTES))[1:]  # the first warms up
    return [{"bytes": n, "seconds": float(s)} for n, s in zip(MESSAGE_BYTES, np.median(rounds, axis=0), strict=True)]


def _time_collective(operation: Operation, group: dist.ProcessGroup, num_ranks: int) -> list[float]:
    """Seconds, round by round of all sizes."""
    parts = [torch.ones(max(1, size // 4 // num_ranks)) for size in MESSAGE_BYTES]
    wholes = [torch.ones(part.numel() * num_ranks) for part in parts]
    taken = []
    for _ in range(ROUNDS):
        for part, whole in zip(parts, wholes, strict=True):
            start_s = time.perf_counter()
            if operation is Operation.all_reduce:
                dist.all_reduce(whole, group=group)
            elif operation is Operation.all_gather:
                dist.all_gather_into_tensor(whole, part, group=group)
            else:
                dist.reduce_scatter_tensor(part, whole, group=group)
            taken.append(time.perf_counter() - start_s)
    return taken


def _time_messages(flag: Path) -> list[float]:
    """Seconds from posting a message on rank 0 to holding it on rank 1, round by round of all sizes, as in a training
    step: the sender goes on computing, and so do all other ranks. Collective; the clock is the host's."""
    rank, times = dist.get_rank(), []
    if rank > 1:
        while not flag.exists():
            _compute_a_little()
    messages = [torch.ones(size // 4) for size in MESSAGE_BYTES]
    for _ in range(ROUNDS if rank < 2 else 0):
        for message in messages:
            if rank == 0:
                times.append(time.monotonic())
                work = dist.isend(message, 1)
                _compute_a_little()
                work.wait()
            else:
                dist.recv(message, 0)
                times.append(time.monotonic())
    if rank == 1:
        flag.touch()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    return [received - sent for sent, received in zip(everyone[0], everyone[1], strict=True)]


def _compute_a_little() -> None:
    """A few milliseconds of matrix products."""
    matrix = torch.ones(256, 256)
    for _ in range(10):
        matrix = (matrix @ matrix) / 256
