"""The RNG streams of a rank in a checkpoint.

A module's streams are saved for each of its ranks, at (pp, tp, dp x cp): they go back only to the same place of the
same layout, on whatever rank that is now. Under another layout they have no owner, and are drawn afresh.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mosaic.parallel_state_ext.scope import Scopes

PROCESS = "~rng"  # stands among modules' names for the streams that belong to the process, not to a module


class RngStates:
    """`sharded` while saving gives every stream; inside `only`, those that are asked for.

    `_asked` names these: all but inside `only`.
    """

    def __init__(self, scopes: Scopes, rank: int, world_size: int) -> None:
        self._scopes, self._rank, self._world_size = scopes, rank, world_size
        self._asked: Collection[str] = frozenset({*scopes.states(), PROCESS})

    @contextlib.contextmanager
    def only(self, names: Collection[str]) -> Iterator[None]:
        """Within the body only the streams of these modules (and of PROCESS, if it is among them) are asked for."""
        before, self._asked = self._asked, names
        try:
            yield
        finally:
            self._asked = before

    def sharded(self, module: str, groups: ProcessGroupCollection) -> dict[str, ShardedObject]:
        """{"<module>.rng": its streams on this rank}, or nothing."""
        if module not in self._asked:
            return {}
        place = (groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank())
        shape = (groups.pp.size(), groups.tp.size(), groups.dp_cp.size())
        key = f"{module}.rng"
        return {key: ShardedObject(key, self._scopes.states()[module], shape, place)}

    def sharded_process(self) -> dict[str, ShardedObject]:
        """{"~rng": the streams outside any module}, or nothing."""
        if PROCESS not in self._asked:
            return {}
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        return {PROCESS: ShardedObject(PROCESS, states, (self._world_size,), (self._rank,))}

    def restore(self, module: str, streams: Any) -> None:
        """Put back what `sharded` held."""
        self._scopes.restore({module: streams})

    def restore_process(self, states: dict[str, Any]) -> None:
        """Put back what `sharded_process` held."""
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])

    def renew(self, modules: Collection[str], fresh: Scopes) -> None:
        """Replace these modules' streams by those of `fresh`."""
        self._scopes.restore({name: state for name, state in fresh.states().items() if name in modules})
