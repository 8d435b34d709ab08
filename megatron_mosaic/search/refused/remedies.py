"""What would make a plan fit, as words to add to the command: found by searching with them, not by rule.

first   another plan of the same job: what a pin, an exclusion or a limit forbids    that with the fastest first plan
then    another job: fewer samples in a step
last    more nodes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.search.refused.miss import Miss
from megatron_mosaic.search.space import Space
from megatron_mosaic.units import format_seconds

Words = tuple[str, ...]
_HALVINGS = 4  # of the batch that are tried
_DOUBLINGS = 4  # of the nodes
_OF_MODULES = ("sequence_parallel", "recompute", "unit", "ranks")
_AXES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Words with which there is a plan, and the step of the first one found."""

    words: Words
    step_s: float

    def __str__(self) -> str:
        return f"add {' '.join(self.words)} (found by search: a step of {format_seconds(self.step_s)} or less)"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"words": list(self.words), "step_s": self.step_s}


def find_remedy(space: Space, miss: Miss, limit_bytes: float, step_s: Callable[[Words], float]) -> Remedy | None:
    """The cheapest; `step_s` searches with such words added and says infinity where there is no plan either."""
    needs_parameters = miss.always_bytes > limit_bytes  # fewer samples or more recomputation do not help
    for words in list_remedies(space, fewer_samples=not needs_parameters):
        found = [Remedy(words=each, step_s=seconds) for each in words if (seconds := step_s(each)) < math.inf]
        if found:
            return min(found, key=lambda each: each.step_s)
    return None


def list_remedies(space: Space, *, fewer_samples: bool) -> Iterator[list[Words]]:
    """Alternatives of equal cost together, the cheapest first."""
    lifted = [*_limits(space), *_pins(space)]
    if lifted:
        yield lifted
    if len(lifted) > 1:
        yield [tuple(dict.fromkeys(word for words in lifted for word in words))]
    batch = space.workload.global_batch_size
    for halvings in range(1, _HALVINGS + 1) if fewer_samples else ():
        if batch % 2**halvings == 0:
            yield [(f"workload.global_batch_size={batch // 2**halvings}",)]
    if not space.cluster.shared_cores:
        for doublings in range(1, _DOUBLINGS + 1):
            yield [(f"cluster.num_nodes={space.cluster.num_nodes * 2**doublings}",)]


def _limits(space: Space) -> Iterator[Words]:
    config, cluster = space.config, space.cluster
    if config.max_tp < cluster.gpus_per_node:
        yield (f"search.max_tp={cluster.gpus_per_node}",)
    deepest = min(max(module.num_layers for module in space.workload.modules), cluster.num_ranks)
    if config.max_pp < deepest:
        yield (f"search.max_pp={deepest}",)
    if config.exclude.recompute:
        yield ("search.exclude.recompute=[]",)
    if config.exclude.schedule:
        yield ("search.exclude.schedule=[]",)


def _pins(space: Space) -> Iterator[Words]:
    pin = space.config.pin
    for key in ("schedule", "micro_batch_size"):
        if getattr(pin, key) is not None:
            yield (f"search.pin.{key}=null",)
    for name, own in pin.modules.items():
        for key in _OF_MODULES:
            if getattr(own, key) is not None:
                yield (f"search.pin.{name}.{key}=null",)
        pinned = [axis for axis in _AXES if getattr(own.layout, axis) is not None]
        if pinned:
            yield tuple(f"search.pin.{name}.layout.{axis}=null" for axis in pinned)
