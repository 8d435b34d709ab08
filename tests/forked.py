"""Bodies of tests that need several ranks: forked from this process, in one gloo world."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.launch.forked import run_forked

_PORTS = (15_000, 32_768)  # Linux gives connections 32,768 and above, others 49,152

torch.set_num_threads(1)  # a forked child of a process that has used an OpenMP pool may hang


def run_gloo(world_size: int, body: Callable[..., None], *args: Any, timeout_s: float = 120.0) -> None:
    """Run `body(*args)` on every rank of a gloo world. RankFailure carries the traceback of a rank that failed."""
    assert not dist.is_initialized(), "another test left its process group behind; the ranks would inherit it"
    run_forked(world_size, _in_a_world, body, *args, timeout_s=timeout_s)


def free_port() -> int:
    """A free port below those that systems give to connections: none of the ranks' own takes it before it is used."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _in_a_world(body: Callable[..., None], *args: Any) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    body(*args)
    dist.barrier()  # nobody leaves while another still talks
