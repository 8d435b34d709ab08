"""A whole search: space, evaluator, steps and the chosen plan with its prediction written in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.plan import Plan, Prediction
from megatron_mosaic.search.evaluate import Evaluator
from megatron_mosaic.search.greedy import Step, search_greedy
from megatron_mosaic.search.space import SearchConfig, Space


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The plan, how it was found, and what it is predicted to do."""

    plan: Plan
    simulation: Simulation
    steps: tuple[Step, ...]
    search_s: float
    evaluated: int
    evaluator: Evaluator
    space: Space


def find_plan(
    model: CostModel, config: SearchConfig, *, progress: Callable[[Step], None] | None = None
) -> SearchResult:
    """The best plan that the greedy search finds. NoFeasiblePlan when there is none."""
    began = time.perf_counter()
    space = Space(workload=model.workload, cluster=model.cluster, config=config)
    evaluator = Evaluator(model=model, memory_frac=config.memory_frac)
    steps = []
    for step in search_greedy(space, evaluator):
        steps.append(step)
        if progress:
            progress(step)
    simulation = evaluator.simulate(steps[-1].plan)
    predicted = Prediction(step_s=simulation.step_s, peak_bytes=simulation.peak_bytes, cost_model=model.name)
    return SearchResult(
        plan=replace(steps[-1].plan, predicted=predicted),
        simulation=simulation,
        steps=tuple(steps),
        search_s=time.perf_counter() - began,
        evaluated=evaluator.evaluated,
        evaluator=evaluator,
        space=space,
    )
