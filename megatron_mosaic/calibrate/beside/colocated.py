"""This machine's interference: blocks alone and beside each other, measured, and the constants fitted to them.

The sizes lie between those of `scripts/bench_colocation.py`, which therefore judges the constants on pairs that they
were not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.calibrate.beside import pairs
from megatron_mosaic.calibrate.beside.interference import Fit, PairTime, Side, error_frac
from megatron_mosaic.calibrate.beside.pairs import SIDES, Block, BlockSize
from megatron_mosaic.colocation.backend_cpu import CpuBackend, cores_of_rank
from megatron_mosaic.colocation.lane import Lanes
from megatron_mosaic.parallel_state_ext.lane_state import lane_thread
from megatron_mosaic.parallel_state_ext.scope import Scopes

MAX_LOADED_FRAC = 0.05  # of the cores' time, taken by others: beyond it no pair means anything
HIDDEN = ((96, 96), (96, 192), (192, 192), (192, 384), (384, 384), (640, 640))
REPEATS = 5


def cpu_sizes(hidden: tuple[int, int]) -> tuple[BlockSize, BlockSize]:
    """An encoder's block and a backbone's, as a CPU trains them."""
    encoder, backbone = hidden
    is_long = encoder >= 256 or backbone > encoder
    return (
        BlockSize(hidden=encoder, tokens=64, items=4),
        BlockSize(hidden=backbone, tokens=128 if is_long else 64, items=2),
    )


class Alone:
    """Blocks alone, each on what it may be granted: measured once a block and count."""

    def __init__(self, scopes: Scopes, dtype: torch.dtype, repeats: int, num_units: int) -> None:
        self._repeats, self._num_units = repeats, num_units
        self._seconds: dict[str, dict[int, float]] = {}
        torch.set_num_threads(1)
        self.host_s = pairs.host_s(dtype, scopes, repeats)  # of a unit, what the host spends on launches

    def side(self, block: Block, cores: Iterable[int]) -> Side:
        """A block's units alone on each of these counts of cores."""
        known = self._seconds.setdefault(block.size.name, {})
        for count in cores:
            if count not in known:
                torch.set_num_threads(count)
                known[count] = pairs.alone_s(block, self._repeats) * self._num_units
        torch.set_num_threads(1)
        return Side(
            name=block.size.name,
            alone_s=dict(known),
            moved_bytes=block.moved_bytes * self._num_units,
            host_s=self.host_s * self._num_units,
            footprint_bytes=block.footprint_bytes,
        )


def measure_interference(
    bandwidth_bytes_per_s: float,
    hidden: tuple[tuple[int, int], ...] = HIDDEN,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """What `hardware.profile.InterferenceFit` holds; None where a rank has no two cores, or where others use them. A
    process of one rank, whose process group this makes and destroys."""
    num_cores = len(cores_of_rank())
    if num_cores < 2 or pairs.loaded_frac(num_cores) > MAX_LOADED_FRAC:
        return None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    scopes, lanes = pairs.make_scopes(), CpuBackend(lane_thread).open({0: 0.5, 1: 0.5})
    alone = Alone(scopes, torch.float32, REPEATS, num_units=1)
    found = []
    for each in hidden:
        progress(f"blocks of width {each[0]} and {each[1]}")
        found.append(_measure_pair(each, scopes, lanes, alone))
    lanes.close()
    dist.destroy_process_group()
    fit = Fit(found, bandwidth_bytes_per_s)
    best = fit.best()
    return {
        "residual": best.residual,
        "serial_frac": best.serial_frac,
        "cache_bytes": best.cache_bytes,
        "layer_host_s": alone.host_s / pairs.NUM_LAYERS,
        "num_pairs": len(found),
        "error_frac": error_frac(found, [best] * len(found)),
        "held_out_error_frac": error_frac(found, fit.held_out()),
    }


def _measure_pair(hidden: tuple[int, int], scopes: Scopes, lanes: Lanes, alone: Alone) -> PairTime:
    """One pair on the cores that its lanes were granted."""
    sizes = cpu_sizes(hidden)
    blocks = (Block(sizes[0], torch.float32, scopes, SIDES[0]), Block(sizes[1], torch.float32, scopes, SIDES[1]))
    granted = (lanes.infos[0].granted, lanes.infos[1].granted)
    beside_s = pairs.beside_s(blocks, lanes, granted, 1, REPEATS)
    first, second = (alone.side(block, (count,)) for block, count in zip(blocks, granted))
    return PairTime(sides=(first, second), granted=granted, beside_s=beside_s)
