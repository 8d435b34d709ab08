"""What a process has one of, and every lane that runs beside another needs for itself. All of it, in one place.

    state                            there is one for    kept apart by
    the module whose code runs       every thread        ActiveModule
    Megatron's RNG tracker           every thread        keep_tracker_by_thread
    torch's CPU generator            every thread        lane_thread (rebound/lane_random)
    grad mode                        every thread        torch; lane_thread sets it
    Megatron's global memory buffer  every module        LaneMemory
    collectives' groups              every module        Grids(apart=...)
    rows handed over, spare buffers  every channel       a lock in RowChannel
    routes and joined batches        every rank          a lock in RouteCache and Batches
    losses, live forwards            every module        LaneRunner

On a CPU a lane is a thread. On a GPU one thread launches the work of all lanes, one action after the other, so what is
kept by thread needs nothing there; buffers and groups do, because streams use them at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor

from megatron_mosaic.parallel_state_ext.rebound import lane_random
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_rng_tracker, rebind_scratch_memory


class ActiveModule(threading.local):
    """The module whose code a thread runs: `_name`, None between modules."""

    def __init__(self) -> None:
        self._name: str | None = None

    @property
    def name(self) -> str | None:
        return self._name

    def begin(self, module: str) -> None:
        """Code of this module follows, until `end`. Modules do not nest."""
        assert self._name is None, f"{module} entered while {self._name} runs"
        self._name = module

    def end(self) -> None:
        """The module's code is over."""
        self._name = None


ACTIVE = ActiveModule()


class LaneMemory(GlobalMemoryBuffer):
    """Megatron's scratch memory, for every module its own: two lanes would gather into one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._of_module: dict[str | None, GlobalMemoryBuffer] = {}

    def get_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, from the buffer of the module whose code asks."""
        return self._of_module.setdefault(ACTIVE.name, GlobalMemoryBuffer()).get_tensor(*args, **kwargs)


def keep_tracker_by_thread() -> None:
    """Let every thread see an RNG tracker of its own, with no streams until some are set.

    Again after anything that makes a new tracker: `model_parallel_cuda_manual_seed(force_reset_rng=True)` does.
    """
    tracker = random.get_cuda_rng_tracker()
    if not isinstance(tracker, threading.local):
        kind = type(f"Thread{type(tracker).__name__}", (threading.local, type(tracker)), {})
        rebind_rng_tracker(kind())


def keep_memory() -> None:
    """Let there be scratch memory: Megatron makes it with its global groups only."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        rebind_scratch_memory(GlobalMemoryBuffer())


def keep_memory_by_module() -> None:
    """Let every module have scratch memory of its own."""
    if not isinstance(parallel_state._GLOBAL_MEMORY_BUFFER, LaneMemory):
        rebind_scratch_memory(LaneMemory())


@contextlib.contextmanager
def lane_thread(grad_enabled: bool) -> Iterator[None]:
    """The body is what a lane's thread does in one step."""
    with lane_random.own_generator(), torch.set_grad_enabled(grad_enabled):
        yield
