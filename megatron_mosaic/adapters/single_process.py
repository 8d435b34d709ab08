"""A script's own code sees one process: every global group is this rank alone, every degree in the arguments is 1.

So `model_provider`, the dataset provider and `get_batch` run unmodified on every rank, and what they build or read is
the whole of it. Outside of the `with`, `parallel_state` is uninitialised, as under every plan.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mosaic.parallel_state_ext.rebound.rebind import rebound_parallel_state

# What a script sees. Checkpoints of a plan are its own affair: pretrain_vlm.py asserts the format of Megatron's.
ALONE: Mapping[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
    "data_parallel_size": 1,
    "world_size": 1,
    "ckpt_format": "torch",
}


class SingleProcess:
    """`with alone(): script_function(...)`, on any rank of an initialised world; one thread after the other."""

    def __init__(self, args: argparse.Namespace, **seen: Any) -> None:
        """`seen`: what else the script shall see in its arguments."""
        self._args, self._seen = args, {**ALONE, **seen}
        self._lock = threading.RLock()

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        return dist.new_group([dist.get_rank()], use_local_synchronization=True)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        args = vars(self._args)
        with self._lock:
            before = {key: args[key] for key in self._seen if key in args}
            args.update({key: self._seen[key] for key in before})
            try:
                with rebound_parallel_state(self._group):
                    yield
            finally:
                args.update(before)


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """A world that is this process, for code that asks for one before the real world exists."""
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
