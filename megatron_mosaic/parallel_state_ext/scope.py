"""The module whose code is running: its RNG streams are installed, everybody else's are put away.

Megatron's `parallel_state` stays uninitialised for the whole job. Modules get their groups as arguments, so code
that reaches for a global group raises at once and can never read another module's.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_mosaic.parallel_state_ext.lane_state import (
    ACTIVE,
    keep_memory,
    keep_memory_by_module,
    keep_tracker_by_thread,
)
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import lane_random
from megatron_mosaic.parallel_state_ext.rebound.cpu import is_cpu

Streams = Mapping[str, torch.Tensor]  # of one module: name -> state
_SEED_BITS = 62  # so that Megatron's own offsets still fit into 63


def stream_seed(seed: int, module: str, *, pp: int, dp: int, cp: int) -> int:
    """The seed of a module's streams at one place of its layout, the same for all of the place's tp ranks.

    A digest, not a sum of strides: no number of stages, replicas or modules makes two places meet, and a place's seed
    depends neither on the world, nor on the ranks that run the module, nor on the modules beside it.
    `model_parallel_cuda_manual_seed` derives the default stream from it (equal on tp ranks), and the model-parallel and
    expert streams by offsets of the tp and ep rank. All 62 bits count for CUDA's generator, the low 32 for
    the CPU's.
    """
    digest = hashlib.sha256(f"{seed}/{module}/pp{pp}/dp{dp}/cp{cp}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


class Scopes:
    """RNG streams of each module on this rank: `with scopes.enter("vision"): ...`.

    Modules that are kept apart may be entered at the same time, in different threads; one runs in one at a time.
    """

    def __init__(self, seed: int, view: RankView, apart: Collection[str] = ()) -> None:
        """`apart`: modules that run beside others, on this rank or another. Without any, lanes take turns: torch's
        generator, Megatron's tracker and its scratch memory are the process's."""
        assert not parallel_state.model_parallel_is_initialized(), "a plan's modules never share global groups"
        self._default: dict[str, torch.Tensor] = {}
        self._tracked: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in view.modules.items():
            at = module.at
            model_parallel_cuda_manual_seed(
                stream_seed(seed, name, pp=at.pp, dp=at.dp, cp=at.cp),
                tp_rank=at.tp,
                ep_rank=module.expert_rank,
                # Not the expert-tp rank: with whole experts on every tp rank (etp = 1) that is 0 on all of them, and
                # they would drop the same places of different tokens.
                etp_rank=at.tp,
                force_reset_rng=True,
            )
            self._default[name] = _get_rng_state()
            self._tracked[name] = get_cuda_rng_tracker().get_states()
        if not apart:
            keep_memory()
            return
        if is_cpu():
            lane_random.install()
            keep_tracker_by_thread()
        keep_memory_by_module()

    @property
    def active(self) -> str | None:
        """The module whose code this thread runs, None between modules."""
        return ACTIVE.name

    @contextlib.contextmanager
    def enter(self, module: str) -> Iterator[None]:
        """Run the body with this module's RNG streams. Needed in forward, and again in backward for recomputation."""
        ACTIVE.begin(module)
        try:
            outer, tracker = _get_rng_state(), get_cuda_rng_tracker()
            _set_rng_state(self._default[module])
            tracker.set_states(dict(self._tracked[module]))
            try:
                yield
            finally:
                self._default[module] = _get_rng_state()
                self._tracked[module] = tracker.get_states()
                _set_rng_state(outer)
        finally:
            ACTIVE.end()

    @contextlib.contextmanager
    def enter_again(self, module: str, streams: Streams) -> Iterator[None]:
        """Run the body with the module's streams as they were once (`states`); after it they are what they are now."""
        now = self.states()[module]
        self.restore({module: streams})
        try:
            with self.enter(module):
                yield
        finally:
            self.restore({module: now})

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every stream of every module on this rank, for checkpoints."""
        return {name: {"default": self._default[name], **self._tracked[name]} for name in self._default}

    def restore(self, states: Mapping[str, Streams]) -> None:
        """Put back what `states` returned."""
        for name, streams in states.items():
            self._default[name] = streams["default"]
            self._tracked[name] = {key: value for key, value in streams.items() if key != "default"}


def _get_rng_state() -> torch.Tensor:
    return torch.get_rng_state() if is_cpu() else torch.cuda.get_rng_state()


def _set_rng_state(state: torch.Tensor) -> None:
    torch.set_rng_state(state) if is_cpu() else torch.cuda.set_rng_state(state)
