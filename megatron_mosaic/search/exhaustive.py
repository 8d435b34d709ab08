"""Brute force over the whole space: the oracle of the greedy search's tests. Tiny clusters only."""

from __future__ import annotations

import math
from itertools import product

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.search.evaluate import Candidate, Evaluator, best_of
from megatron_mosaic.search.space import Space

MAX_PLANS = 200_000


def search_exhaustive(space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest feasible plan of the space without shares, or None. ConfigError when there are too many."""
    placements = [tuple(space.placements(module)) for module in space.workload.modules]
    size = math.prod(map(len, placements))
    if size > MAX_PLANS:
        raise ConfigError(
            "exhaustive search",
            got=f"{size} placements",
            expected=f"at most {MAX_PLANS}",
            fix="use a smaller cluster, or the greedy search",
        )
    names = [module.name for module in space.workload.modules]
    best: Candidate | None = None
    for choice in product(*placements):
        modules = dict(zip(names, choice))
        dp = modules[space.workload.backbone.name].layout.dp
        plans = [space.make_plan(size, modules) for size in space.micro_batch_sizes(dp)]
        best = best_of(plans, evaluator, below_s=best.step_s if best else math.inf) or best
    return best
