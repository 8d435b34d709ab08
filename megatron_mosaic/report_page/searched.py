"""All plans that a search simulated, as time over memory: who is on the Pareto front, how the search went, and where
others' plans stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_mosaic.plan import Plan
from megatron_mosaic.search.baselines import BASELINES, best_baseline
from megatron_mosaic.search.evaluate import Outcome
from megatron_mosaic.search.find import SearchResult

MAX_POINTS = 2500  # beside the front, the path and the baselines


def describe_search(result: SearchResult, plan: Plan, outcome: Outcome, limit_bytes: float) -> dict[str, Any]:
    """Points, numbers of those on the front, of the search's steps and of the baselines (null: no plan fits).

    `plan`, `outcome`: the plan that the page is about, which the search need not have met.
    """
    evaluator = result.evaluator
    baselines = {name: best_baseline(name, result.space, evaluator) for name in BASELINES}
    met: dict[Plan, Outcome] = {**evaluator.outcomes, plan: outcome}
    named = {step.plan for step in result.steps} | {plan} | {each.plan for each in baselines.values() if each}
    for each in named:
        if each not in met:  # chosen by an estimate, or by time that was over
            simulation = evaluator.simulate(each)
            met[each] = Outcome(step_s=simulation.step_s, peak_bytes=simulation.peak_bytes)
    plans = list(met)
    front = pareto_front([met[each] for each in plans], limit_bytes)
    kept = _thin_out(plans, {*front, *(number for number, each in enumerate(plans) if each in named)})
    place = {number: at for at, number in enumerate(kept)}
    at = {each: place[number] for number, each in enumerate(plans) if number in place}
    return {
        "points": [[met[plans[n]].peak_bytes, met[plans[n]].step_s, describe_plan(plans[n])] for n in kept],
        "front": [place[number] for number in front],
        "path": [{"point": at[step.plan], "reason": step.reason} for step in result.steps],
        "baselines": {name: at[found.plan] if found else None for name, found in baselines.items()},
        "sources": {name: baseline.source for name, baseline in BASELINES.items()},
        "plan": at[plan],
        "limit": limit_bytes,
        "counts": {verdict.value: count for verdict, count in evaluator.counts.items()},
        "left_out": len(plans) - len(kept),
    }


def pareto_front(outcomes: Sequence[Outcome], limit_bytes: float) -> list[int]:
    """Of those that fit, the numbers of those that none beats in seconds and bytes, by bytes; of equals, the first."""
    fitting = [number for number, outcome in enumerate(outcomes) if outcome.peak_bytes <= limit_bytes]
    order = sorted(fitting, key=lambda i: (outcomes[i].peak_bytes, outcomes[i].step_s, i))
    front: list[int] = []
    for number in order:
        if not front or outcomes[number].step_s < outcomes[front[-1]].step_s:
            front.append(number)
    return front


def _thin_out(plans: Sequence[Plan], wanted: Iterable[int]) -> list[int]:
    """Numbers of the plans that are drawn: those wanted, and others in even steps."""
    kept = set(wanted)
    others = [number for number in range(len(plans)) if number not in kept]
    stride = -(-len(others) // MAX_POINTS) or 1
    return sorted(kept | set(others[::stride]))


def describe_plan(plan: Plan) -> str:
    """A plan in one line."""
    placed = plan.modules.items()
    modules = ", ".join(f"{name} {each.ranks} {each.layout}{_extras(name, plan)}" for name, each in placed)
    return f"{plan.schedule}, micro-batch {plan.micro_batch_size}: {modules}"


def _extras(name: str, plan: Plan) -> str:
    placed = plan.modules[name]
    said: Mapping[str, str] = {
        "unit": f" unit {placed.unit}" if placed.unit > 1 else "",
        "share": f" share {placed.quota.share:g}" if placed.quota.share < 1 else "",
        "recompute": f" recompute {placed.recompute}" if placed.recompute.value != "none" else "",
    }
    return "".join(said.values())
