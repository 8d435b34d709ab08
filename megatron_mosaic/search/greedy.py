"""The search: start from the best plans of the known families, then improve one thing at a time while it pays.

    phase 1  start       the best homogeneous plan, and the best disaggregated one
    phase 2  layout      per module, another layout on its ranks (the backbone's with a micro-batch that fits)
    phase 3  ranks       per module, another rank set with the layouts on it
    phase 4  micro-batch
    phase 5  share       per module, where the cluster grants shares
    phase 6  pairs       two modules moved at once, when no single move gains
    repeat 2-6 from each start until nothing gains `min_gain_frac`; the better end wins

Every improvement is yielded with its reason, so that a plan can be explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from megatron_mosaic.errors import MosaicError, PlanError
from megatron_mosaic.plan import ModulePlan, Plan, RankSet
from megatron_mosaic.plan.validate import MAX_ACTIONS
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.search.baselines import BASELINES, best_baseline
from megatron_mosaic.search.evaluate import Evaluator, Verdict, best_of
from megatron_mosaic.search.space import Space
from megatron_mosaic.units import format_bytes

MAX_PAIRS = 1000  # placements of one pair of modules in phase 6; above it, each has few layouts on a set
FEW_LAYOUTS = 2


class NoFeasiblePlan(PlanError):
    """The search has an answer, and it is no (exit status 1)."""

    is_answer = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The search's best plan so far on one way, and why it was taken."""

    plan: Plan
    step_s: float
    reason: str


def search_greedy(space: Space, evaluator: Evaluator) -> Iterator[Step]:
    """Steps from each start to its end; the last step is the best plan. NoFeasiblePlan when there is none."""
    ends: list[Step] = []
    for name in BASELINES:
        start = best_baseline(name, space, evaluator)
        if start is None:
            continue
        step = Step(plan=start.plan, step_s=start.step_s, reason=f"start: best {name} plan")
        yield step
        for better in _improve(step, space, evaluator):
            step = better
            yield step
        ends.append(step)
    if not ends:
        raise _infeasible(space, evaluator)
    best = min(ends, key=lambda step: step.step_s)
    if best is not ends[-1]:
        yield replace(best, reason="the better of the ends")


def _improve(step: Step, space: Space, evaluator: Evaluator) -> Iterator[Step]:
    phases: tuple[tuple[str, Callable[[Plan, Space], Iterator[list[Plan]]]], ...] = (
        ("layout", _layout_moves),
        ("ranks", _rank_moves),
        ("micro-batch", _micro_batch_moves),
        ("share", _share_moves),
        ("pair", _pair_moves),
    )
    gained = True
    while gained:
        gained = False
        for name, moves in phases:
            if name == "pair" and gained:
                continue  # single moves are cheaper: first to their end
            for plans in moves(step.plan, space):
                found = best_of(plans, evaluator, below_s=step.step_s * (1 - space.config.min_gain_frac))
                if found is not None:
                    reason = f"{name}: {_difference(step.plan, found.plan)}"
                    step, gained = Step(plan=found.plan, step_s=found.step_s, reason=reason), True
                    yield step
                    break  # the other moves start from the new plan


def _with(plan: Plan, space: Space, changes: dict[str, ModulePlan]) -> list[Plan]:
    """The plan with some modules replaced; with every micro-batch size that fits when the backbone's dp changed."""
    modules = {**plan.modules, **changes}
    backbone = space.workload.backbone.name
    dp = modules[backbone].layout.dp
    if dp == plan.modules[backbone].layout.dp:
        return [replace(plan, modules=modules)]
    return [replace(plan, modules=modules, micro_batch_size=size) for size in space.micro_batch_sizes(dp)]


def _by_work(space: Space) -> list[ModuleConfig]:
    """Modules, the one with most layers x width^2 x tokens first: its moves matter most."""
    return sorted(
        space.workload.modules,
        key=lambda m: -m.num_layers * m.hidden_size**2 * m.tokens_per_item * m.items_per_sample,
    )


def _layout_moves(plan: Plan, space: Space) -> Iterator[list[Plan]]:
    for module in _by_work(space):
        placed = plan.modules[module.name]
        yield [
            other
            for layout in space.layouts(module, len(placed.ranks))
            if layout != placed.layout
            for other in _with(plan, space, {module.name: replace(placed, layout=layout)})
        ]


def _rank_moves(plan: Plan, space: Space) -> Iterator[list[Plan]]:
    for module in _by_work(space):
        placed = plan.modules[module.name]
        yield [
            other
            for ranks in _distinct_sets(plan, space, module.name)
            for layout in space.layouts(module, len(ranks))
            for other in _with(plan, space, {module.name: replace(placed, ranks=ranks, layout=layout)})
        ]


def _distinct_sets(plan: Plan, space: Space, module: str) -> Iterator[RankSet]:
    """Rank sets other than the module's own; of those that overlap every other lane alike, the first."""
    others = [
        placed.stage_ranks(stage)
        for name, placed in plan.modules.items()
        if name != module
        for stage in range(placed.layout.pp)
    ]
    seen = set()
    for ranks in space.rank_sets():
        overlaps = (len(ranks), *(_num_common(ranks, other) for other in others))
        if ranks != plan.modules[module].ranks and overlaps not in seen:
            seen.add(overlaps)
            yield ranks


def _num_common(one: RankSet, other: RankSet) -> int:
    """Ranks that are in both."""
    spans = product(one.spans, other.spans)
    return sum(max(0, min(stop, end) - max(first, begin)) for (first, stop), (begin, end) in spans)


def _micro_batch_moves(plan: Plan, space: Space) -> Iterator[list[Plan]]:
    dp = plan.modules[space.workload.backbone.name].layout.dp
    sizes = space.micro_batch_sizes(dp)
    yield [replace(plan, micro_batch_size=size) for size in sizes if size != plan.micro_batch_size]


def _share_moves(plan: Plan, space: Space) -> Iterator[list[Plan]]:
    quotas = space.quotas()
    if len(quotas) == 1:
        return
    yield [
        replace(plan, modules={name: replace(placed, quota=quota) for name, placed in plan.modules.items()})
        for quota in quotas
    ]
    for module in _by_work(space):
        placed = plan.modules[module.name]
        yield [
            replace(plan, modules={**plan.modules, module.name: replace(placed, quota=quota)})
            for quota in quotas
            if quota != placed.quota
        ]


def _pair_moves(plan: Plan, space: Space) -> Iterator[list[Plan]]:
    """Two modules at once: what one gives up the other takes."""
    for pair in combinations(_by_work(space), 2):
        choices = [_end_blocks(space, module, math.inf) for module in pair]
        if math.prod(map(len, choices)) > MAX_PAIRS:
            choices = [_end_blocks(space, module, FEW_LAYOUTS) for module in pair]
        yield [
            other
            for chosen in product(*choices)
            for other in _with(
                plan,
                space,
                {m.name: replace(c, quota=plan.modules[m.name].quota) for m, c in zip(pair, chosen)},
            )
            if other != plan
        ]


def _end_blocks(space: Space, module: ModuleConfig, most: float) -> list[ModulePlan]:
    """The blocks of each size at either end of the cluster: two of them are nested, equal or as disjoint as can be.

    With the `most` layouts of least communication: lowest tp x pp first.
    """
    n = space.cluster.num_ranks
    found = []
    for ranks in space.rank_sets():
        if ranks.first == 0 or ranks.last == n - 1:
            layouts = sorted(space.layouts(module, len(ranks)), key=lambda x: (x.tp * x.pp, x.pp))
            found += [ModulePlan(ranks=ranks, layout=x) for i, x in enumerate(layouts) if i < most]
    return found


def _difference(before: Plan, after: Plan) -> str:
    """What changed, in words."""
    changes = []
    for name, new in after.modules.items():
        old = before.modules[name]
        if new.ranks != old.ranks:
            changes.append(f"{name} on ranks {new.ranks} (was {old.ranks})")
        if new.layout != old.layout:
            changes.append(f"{name} {new.layout} (was {old.layout})")
        if new.quota != old.quota:
            changes.append(f"{name} share {new.quota.share:g} (was {old.quota.share:g})")
    if after.micro_batch_size != before.micro_batch_size:
        changes.append(f"micro-batch {after.micro_batch_size} (was {before.micro_batch_size})")
    return ", ".join(changes)


def _infeasible(space: Space, evaluator: Evaluator) -> MosaicError:
    if evaluator.counts[Verdict.too_large]:
        device_bytes = space.cluster.gpu.memory_bytes * space.config.memory_frac
        return NoFeasiblePlan(
            "search: memory",
            got=f"at least {format_bytes(evaluator.smallest_bytes)} on a rank",
            expected=f"at most {format_bytes(device_bytes)} on some plan",
            fix="use more ranks, raise search.max_tp or search.max_pp, or lower the batch",
        )
    if evaluator.unmeasured is not None:
        return evaluator.unmeasured
    if evaluator.counts[Verdict.too_long]:
        return NoFeasiblePlan(
            "search: actions",
            got=f"more than {MAX_ACTIONS} actions in a step",
            expected="fewer of them on some plan",
            fix="lower workload.global_batch_size, raise search.max_micro_batch_size, or use more ranks",
        )
    return NoFeasiblePlan(
        "search",
        got=f"no layout of all modules on {space.cluster.num_ranks} ranks",
        expected="at least one homogeneous or disaggregated plan",
        fix=f"change workload.global_batch_size ({space.workload.global_batch_size}) or the number of ranks",
    )
