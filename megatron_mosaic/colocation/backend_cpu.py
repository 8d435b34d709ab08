"""Quotas on a CPU: a module's share of its rank's cores is a number of intra-op threads."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from megatron_mosaic.plan.quota import grant_quota


def cores_per_rank() -> int:
    """The cores a rank may call its own: the host's, divided by the ranks on it (torchrun's LOCAL_WORLD_SIZE)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class CpuQuota:
    """Grants each module its threads when its turn comes. Does nothing where CUDA exists.

    `_granted` are the threads of the module that ran last: setting them takes its time.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        cores = cores_per_rank()
        self.threads = {module: grant_quota(share, cores, 1) for module, share in shares.items()}
        self._active = not torch.cuda.is_available()
        self._granted = 0

    def grant(self, module: str) -> None:
        """The module's code runs next."""
        threads = self.threads[module]
        if self._active and threads != self._granted:
            torch.set_num_threads(threads)
            self._granted = threads
