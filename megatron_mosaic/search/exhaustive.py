"""Brute force over the whole space: what the tests hold the greedy search against. Small spaces only (pins help)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import ModulePlan, Plan
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.search.evaluate import Candidate, Evaluator, best_of
from megatron_mosaic.search.sketches.compose import is_chunked
from megatron_mosaic.search.space import Space

MAX_PLANS = 50_000


def every_plan(space: Space) -> Iterator[Plan]:
    """All plans of the space, whatever they cost."""
    modules = space.workload.modules
    backbone = space.workload.backbone
    placements = [[v for ranks in space.rank_sets(m) for v in space.variants(m, ranks)] for m in modules]
    for choice in product(*placements):
        placed = {module.name: each for module, each in zip(modules, choice)}
        layout = placed[backbone.name].layout
        for size in space.micro_batch_sizes(layout.dp):
            microbatches = space.workload.global_batch_size // (size * layout.dp)
            for units in product(*(space.units(m, microbatches, layout.pp) for m in modules)):
                yield from _with_schedules(space, size, placed, units)


def _with_schedules(space: Space, size: int, placed: dict[str, ModulePlan], units: tuple[int, ...]) -> Iterator[Plan]:
    """Under every schedule, with every share."""
    united = {name: replace(each, unit=unit) for (name, each), unit in zip(placed.items(), units)}
    for schedule in space.schedules(is_chunked(united)):
        for quotas in product(space.quotas(), repeat=len(united)):
            modules = {name: replace(each, quota=quota) for (name, each), quota in zip(united.items(), quotas)}
            plan = space.make_plan(size, modules, schedule)
            if space.allows(plan):
                yield plan


def count_plans(space: Space) -> int:
    """How many plans `every_plan` goes through before exclusions; none is built."""
    backbone = space.workload.backbone
    found: int = 0
    others = [module for module in space.workload.modules if module is not backbone]
    beside = [_count_variants(space, module) for module in others]
    every = math.prod(each.total() for each in beside)
    flat = math.prod(sum(n for (_, _, chunked), n in each.items() if not chunked) for each in beside)
    may_order = {chunked: len(space.schedules(chunked)) for chunked in (False, True)}
    for (dp, pp, chunked), count in _count_variants(space, backbone).items():
        unchunked = 0 if chunked else flat
        ordered = unchunked * may_order[False] + (every - unchunked) * may_order[True]
        for size in space.micro_batch_sizes(dp):
            microbatches = space.workload.global_batch_size // (size * dp)
            units: int = math.prod(len(space.units(module, microbatches, pp)) for module in others)
            found += count * ordered * units
    shares: int = len(space.quotas()) ** len(space.workload.modules)
    return found * shares


def _count_variants(space: Space, module: ModuleConfig) -> Counter[tuple[int, int, bool]]:
    """On all rank sets, by (dp, pp, whether it has virtual stages)."""
    found = Counter[tuple[int, int, bool]]()
    sizes = Counter(len(ranks) for ranks in space.rank_sets(module))
    first = {len(ranks): ranks for ranks in space.rank_sets(module)}
    for size, count in sizes.items():
        for each in space.variants(module, first[size]):
            found[each.layout.dp, each.layout.pp, each.layout.vpp > 1] += count
    return found


def search_exhaustive(space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest feasible plan of the space, or None. ConfigError when there are too many."""
    if count_plans(space) > MAX_PLANS:
        raise ConfigError(
            "search.algorithm",
            got=f"exhaustive, of more than {MAX_PLANS} plans",
            expected=f"at most {MAX_PLANS}",
            fix="pin something (search.pin), lower a limit, or use search.algorithm=greedy",
        )
    return best_of(every_plan(space), evaluator, most=MAX_PLANS)
