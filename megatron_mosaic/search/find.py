"""A whole search: space, evaluator, steps and the chosen plan with its prediction written in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.plan import Plan, Prediction
from megatron_mosaic.search.evaluate import Evaluator
from megatron_mosaic.search.exhaustive import search_exhaustive
from megatron_mosaic.search.greedy import NoFeasiblePlan, Step, infeasible, search_greedy
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
    model: CostModel,
    config: SearchConfig,
    *,
    progress: Callable[[Step], None] | None = None,
    heartbeat: Callable[[int], None] = lambda evaluated: None,
) -> SearchResult:
    """The best plan that the greedy search finds. NoFeasiblePlan when there is none. `heartbeat` is told often how many
    plans were priced."""
    began = time.perf_counter()
    space = Space(workload=model.workload, cluster=model.cluster, config=config, setup=model.source.setup)
    evaluator = Evaluator(model=model, memory_frac=config.memory_frac)
    steps = []
    until = began + (config.time_budget_s or math.inf)

    def is_over() -> bool:
        heartbeat(evaluator.evaluated)
        return time.perf_counter() > until

    for step in _search(space, evaluator, is_over):
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


def first_step(model: CostModel, config: SearchConfig) -> Step | None:
    """The first plan that the greedy search finds, not the best; None where there is none."""
    space = Space(workload=model.workload, cluster=model.cluster, config=config, setup=model.source.setup)
    try:
        evaluator = Evaluator(model=model, memory_frac=config.memory_frac)
        return next(search_greedy(space, evaluator, is_over=lambda: True))
    except NoFeasiblePlan:
        return None


def _search(space: Space, evaluator: Evaluator, is_over: Callable[[], bool]) -> Iterator[Step]:
    """Steps of the algorithm that the configuration names."""
    if space.config.algorithm == "greedy":
        yield from search_greedy(space, evaluator, is_over=is_over)
        return
    best = search_exhaustive(space, evaluator)
    if best is None:
        raise infeasible(space, evaluator)
    yield Step(plan=best.plan, step_s=best.step_s, reason="exhaustive: the best of all plans")
