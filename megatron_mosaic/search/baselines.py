"""What others would do, as plans: the best of each family on the same cost model.

homogeneous      one tp x pp x dp for all modules, all on all ranks (Megatron's usual way)
disaggregated    every module alone on its own block of ranks (DistTrain, MIMO's non-colocated mode)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product

from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet
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


BASELINES: dict[str, Callable[[Space], Iterator[Plan]]] = {
    "homogeneous": homogeneous_plans,
    "disaggregated": disaggregated_plans,
}


def best_baseline(name: str, space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest feasible plan of a family, or None."""
    return best_of(BASELINES[name](space), evaluator)
