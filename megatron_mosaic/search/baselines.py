"""What others would do, as plans: the best of each family on the same cost model.

homogeneous      one tp x pp x dp for all modules, all on all ranks (Megatron's usual way)
disaggregated    every module alone on its own block of ranks (DistTrain, MIMO's non-colocated mode)

And what each schedule makes of modules that share all ranks: the backbone in a pipeline, the others data-parallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, product

from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.search.evaluate import Candidate, Evaluator, best_of
from megatron_mosaic.search.space import Space

MAX_SPLITS = 4096  # of the ranks among modules; more are not enumerated


def homogeneous_plans(space: Space) -> Iterator[Plan]:
    """All modules in one layout on all ranks."""
    everyone = RankSet.block(0, space.cluster.num_ranks)
    per_module = [set(space.layouts(module, len(everyone))) for module in space.workload.modules]
    for layout in sorted(set.intersection(*per_module), key=lambda x: (x.tp, x.pp)):
        placed = ModulePlan(ranks=everyone, layout=layout)
        for size in space.micro_batch_sizes(layout.dp):
            yield space.make_plan(size, {module.name: placed for module in space.workload.modules})


def rank_splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ways to give all ranks to `parts` modules in turn, each at least one."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in rank_splits(total - first, parts - 1):
            yield (first, *rest)


def disaggregated_plans(space: Space) -> Iterator[Plan]:
    """Every module on its own consecutive ranks, each in the layout that its bare work likes best: lowest tp first."""
    modules = space.workload.modules
    if space.cluster.num_ranks < len(modules):
        return
    for split in islice(_useful_splits(space), MAX_SPLITS):
        starts = [sum(split[:i]) for i in range(len(split))]
        sets = [RankSet.block(start, size) for start, size in zip(starts, split)]
        choices = [space.layouts(module, size) for module, size in zip(modules, split)]
        backbone = [module.name for module in modules].index(space.workload.backbone.name)
        for layouts in product(*(_few(choice) for choice in choices)):
            for size in space.micro_batch_sizes(layouts[backbone].dp):
                yield space.make_plan(
                    size,
                    {m.name: ModulePlan(ranks=r, layout=x) for m, r, x in zip(modules, sets, layouts)},
                )


def _few(layouts: tuple[Layout, ...]) -> tuple[Layout, ...]:
    """The layouts with the least communication for each pipeline depth: lowest tp first, at most three."""
    return tuple(sorted(layouts, key=lambda x: (x.tp * x.pp, x.pp))[:3])


def _useful_splits(space: Space) -> Iterator[tuple[int, ...]]:
    """Splits in which every module has a layout; on large clusters only the backbone's count is odd."""
    total, parts = space.cluster.num_ranks, len(space.workload.modules)
    grain = max(1, total // 8)
    for split in rank_splits(total // grain, parts):
        sizes = tuple(size * grain for size in split)
        if sum(sizes) == total and all(space.layouts(m, n) for m, n in zip(space.workload.modules, sizes)):
            yield sizes


def schedule_plans(space: Space, name: str) -> Iterator[Plan]:
    """All modules on all ranks, in this schedule: the backbone in at least two stages (two virtual ones each where the
    schedule interleaves), the others with as little tp as their layers and items allow, and one stage."""
    everyone = RankSet.block(0, space.cluster.num_ranks)
    backbone = space.workload.backbone
    others: dict[str, ModulePlan] = {}
    for module in space.workload.modules:
        if module is not backbone:
            flat = [layout for layout in space.layouts(module, len(everyone)) if layout.pp == 1]
            if not flat:
                return
            others[module.name] = ModulePlan(ranks=everyone, layout=min(flat, key=lambda layout: layout.tp))
    vpp = 2 if name == "interleaved" else 1
    for layout in space.layouts(backbone, len(everyone)):
        if layout.pp == 1 or backbone.num_layers % (layout.pp * vpp):
            continue
        placed = {backbone.name: ModulePlan(ranks=everyone, layout=replace(layout, vpp=vpp)), **others}
        for size in space.micro_batch_sizes(layout.dp):
            yield replace(space.make_plan(size, placed), schedule=ScheduleChoice(name))


def best_of_schedule(name: str, space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest plan that fits; where none does, one whose lower bound of bytes is the smallest; None where the
    schedule has no plan at all. Every plan that could win is simulated: how much of it is alive, no bound knows."""
    plans = sorted(schedule_plans(space, name), key=evaluator.bound_s)
    best: Candidate | None = None
    for plan in plans:
        step_s = evaluator.step_s(plan, below_s=best.step_s if best else math.inf)
        if step_s < (best.step_s if best else math.inf):
            best = Candidate(plan=plan, step_s=step_s)
    if best or not plans:
        return best
    smallest = min(plans, key=lambda plan: evaluator.model.price(plan).lower_bound_bytes)
    return Candidate(plan=smallest, step_s=evaluator.simulate(smallest).step_s)


BASELINES: dict[str, Callable[[Space], Iterator[Plan]]] = {
    "homogeneous": homogeneous_plans,
    "disaggregated": disaggregated_plans,
}


def best_baseline(name: str, space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest feasible plan of a family, or None."""
    return best_of(BASELINES[name](space), evaluator)
