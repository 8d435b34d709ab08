"""The module whose code is running: its RNG streams are installed, everybody else's are put away.

Megatron's `parallel_state` stays uninitialised for the whole job. Modules get their groups as arguments, so code
that reaches for a global group raises at once and can never read another module's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_mosaic.parallel_state_ext.cpu import is_cpu

_MODULE_SEED_STRIDE = 10_000  # seeds of two modules never meet (a stage adds 100)
_STAGE_SEED_STRIDE = 100


class Scopes:
    """RNG streams of each module on this rank: `with scopes.enter("vision"): ...`."""

    def __init__(self, seed: int, collections: Mapping[str, ProcessGroupCollection], names: tuple[str, ...]) -> None:
        """`names`: all modules of the plan, in its order: a module's seed must not depend on the rank."""
        assert not parallel_state.model_parallel_is_initialized(), "a plan's modules never share global groups"
        parallel_state._set_global_memory_buffer() if parallel_state._GLOBAL_MEMORY_BUFFER is None else None
        self._default: dict[str, torch.Tensor] = {}
        self._tracked: dict[str, dict[str, torch.Tensor]] = {}
        self.active: str | None = None
        for name, groups in collections.items():
            stage_seed = seed + _MODULE_SEED_STRIDE * (names.index(name) + 1) + _STAGE_SEED_STRIDE * groups.pp.rank()
            model_parallel_cuda_manual_seed(
                stage_seed,
                tp_rank=groups.tp.rank(),
                ep_rank=groups.ep.rank(),
                etp_rank=groups.expt_tp.rank(),
                force_reset_rng=True,
            )
            self._default[name] = _get_rng_state()
            self._tracked[name] = get_cuda_rng_tracker().get_states()

    @contextlib.contextmanager
    def enter(self, module: str) -> Iterator[None]:
        """Run the body with this module's RNG streams. Needed in forward, and again in backward for recomputation."""
        assert self.active is None, f"{module} entered while {self.active} runs"
        outer = _get_rng_state()
        tracker = get_cuda_rng_tracker()
        _set_rng_state(self._default[module])
        tracker.set_states(dict(self._tracked[module]))
        self.active = module
        try:
            yield
        finally:
            self._default[module] = _get_rng_state()
            self._tracked[module] = tracker.get_states()
            _set_rng_state(outer)
            self.active = None

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every stream of every module on this rank, for checkpoints."""
        return {name: {"default": self._default[name], **self._tracked[name]} for name in self._default}

    def restore(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Put back what `states` returned."""
        for name, streams in states.items():
            self._default[name] = streams["default"]
            self._tracked[name] = {key: value for key, value in streams.items() if key != "default"}


def _get_rng_state() -> torch.Tensor:
    return torch.get_rng_state() if is_cpu() else torch.cuda.get_rng_state()


def _set_rng_state(state: torch.Tensor) -> None:
    torch.set_rng_state(state) if is_cpu() else torch.cuda.set_rng_state(state)
