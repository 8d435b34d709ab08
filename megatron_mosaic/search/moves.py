"""What the search may change about a plan: candidates that differ from it in one respect, or in a few together.

schedule      which one, with the units of the modules beside the backbone
layout        of one module, with the unit (of the backbone: with the micro-batch size)
detail        of one module: virtual stages, sequence parallelism, recomputation
ranks         of one module: another number of ranks, elsewhere; with the layouts that lead there
micro-batch   with the units that keep as many samples together
share         of the ranks' cores, where the cluster grants them
pair          two modules at once, on small clusters
bubbles       schedules that are slow to build, for the plan as it is
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product

from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.validate import count_actions
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.search.sketches.compose import Composer, is_chunked
from megatron_mosaic.search.space import SLOW_TO_BUILD, SMALL_RANKS, Space

Moves = Callable[[Plan, Space, Composer], Iterator[list[Plan]]]
MAX_PAIRS = 500  # plans in which one pair of modules is moved
MAX_SLOW_ACTIONS = 1024  # of a step whose schedule is slow to build


def schedule_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    """Every schedule, with each module's unit as it is and with every unit common to all."""
    backbone = space.workload.backbone
    others = [module for module in space.workload.modules if module is not backbone]
    microbatches = plan.num_microbatches(backbone.name)
    units = space.units(others[0], microbatches, plan.modules[backbone.name].layout.pp) if others else ()
    found = []
    for choice in quick_schedules(plan, space):
        other = replace(plan, schedule=choice)
        found.append(other)
        for unit in units:
            found.append(_with(other, {m.name: replace(other.modules[m.name], unit=unit) for m in others}))
    yield _legal(found, plan, space)
    for module in others:
        placed = plan.modules[module.name]
        yield _legal(
            [
                _with(plan, {module.name: replace(placed, unit=unit)})
                for unit in space.units(module, microbatches, plan.modules[backbone.name].layout.pp)
            ],
            plan,
            space,
        )


def layout_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    """Per module, the layouts on as many ranks; of the backbone with the micro-batch sizes that fit."""
    for module in by_work(space):
        placed = plan.modules[module.name]
        found = []
        for layout in _near_layouts(space, module, placed.layout):
            found += _laid_out(plan, space, module, placed.ranks, layout)
        yield _legal(found, plan, space)


def detail_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    """Per module, what is free on its layout; a plan that gains or loses virtual stages gets the schedules for it."""
    for module in by_work(space):
        placed, found = plan.modules[module.name], []
        for layout in space.chunked(module, replace(placed.layout, vpp=1)):
            for split in space.sequence_parallel(module, layout):
                for again in space.recomputes(module):
                    other = replace(placed, layout=layout, sequence_parallel=split, recompute=again)
                    found += _scheduled(_with(plan, {module.name: other}), space)
        yield _legal(found, plan, space)


def rank_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    """Per module, other ranks: those of other modules, behind the last of them, at either end of the cluster."""
    for module in by_work(space):
        found, rows = [], _rows(plan, space, composer, module)
        for ranks in _rank_sets(plan, space, module):
            for layout in rows(len(ranks)):
                found += _laid_out(plan, space, module, ranks, layout, units=False)
        yield _legal(found, plan, space)


def bubble_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    """The schedules that are slow to build, for steps of few actions."""
    if count_actions(plan, space.workload.backbone.name) > MAX_SLOW_ACTIONS:
        return
    choices = [each for each in space.schedules(is_chunked(plan.modules)) if each.name in SLOW_TO_BUILD]
    yield _legal([replace(plan, schedule=choice) for choice in choices], plan, space)


def micro_batch_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    backbone = space.workload.backbone.name
    found = []
    for size in space.micro_batch_sizes(plan.modules[backbone].layout.dp):
        found.append(replace(plan, micro_batch_size=size))
        found.append(_keeping_units(plan, backbone, size))
    yield _legal(found, plan, space)


def share_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    quotas = space.quotas()
    if len(quotas) == 1:
        return
    yield [
        replace(plan, modules={name: replace(placed, quota=quota) for name, placed in plan.modules.items()})
        for quota in quotas
    ]
    for module in by_work(space):
        placed = plan.modules[module.name]
        yield [_with(plan, {module.name: replace(placed, quota=q)}) for q in quotas if q != placed.quota]


def pair_moves(plan: Plan, space: Space, composer: Composer) -> Iterator[list[Plan]]:
    """Two modules at once: what one gives up the other takes."""
    if not space.is_small:
        return
    for one, other in combinations(by_work(space), 2):
        choices = [
            [(ranks, x) for ranks in [plan.modules[m.name].ranks, *_rank_sets(plan, space, m)]
             for x in space.layouts(m, len(ranks))]
            for m in (one, other)
        ]  # fmt: skip
        found = list[Plan]()
        for (ranks, layout), (other_ranks, other_layout) in product(*choices):
            if len(found) >= MAX_PAIRS:
                break
            for first in _laid_out(plan, space, one, ranks, layout, units=False):
                found += _laid_out(first, space, other, other_ranks, other_layout, units=False)
        yield _legal(found[:MAX_PAIRS], plan, space)


def quick_schedules(plan: Plan, space: Space) -> list[ScheduleChoice]:
    """Those that may order the plan and are quickly built; all where no other may."""
    choices = space.schedules(is_chunked(plan.modules))
    return [each for each in choices if each.name not in SLOW_TO_BUILD] or list(choices)


def _near_layouts(space: Space, module: ModuleConfig, layout: Layout) -> list[Layout]:
    """On as many ranks: all on a small cluster, else those that give one axis what they take from another."""
    found = space.layouts(module, layout.num_ranks)
    if space.cluster.num_ranks <= SMALL_RANKS:
        return list(found)
    return [x for x in found if sum(a != b for a, b in zip(x.degrees, layout.degrees)) <= 2]


def _rows(plan: Plan, space: Space, composer: Composer, module: ModuleConfig) -> Callable[[int], Iterable[Layout]]:
    """Layouts worth trying by number of ranks: all on a small cluster, else the leading ones beside this backbone."""
    backbone = space.workload.backbone
    if space.cluster.num_ranks <= SMALL_RANKS:
        return lambda size: space.layouts(module, size)
    if module is backbone:
        return lambda size: ()  # the sketches have tried them
    microbatches = plan.num_microbatches(backbone.name)
    leading = composer.leading_rows(module.name, plan.global_batch_size // microbatches, microbatches)
    return lambda size: dict.fromkeys(row.layout for row in leading.get(size, ()))


def by_work(space: Space) -> list[ModuleConfig]:
    """Modules, the one with most layers x width^2 x tokens first: its moves matter most."""
    return sorted(
        space.workload.modules,
        key=lambda m: -m.num_layers * m.hidden_size**2 * m.tokens_per_item * m.items_per_sample,
    )


def _with(plan: Plan, changes: Mapping[str, ModulePlan]) -> Plan:
    return replace(plan, modules={**plan.modules, **changes})


def _legal(plans: list[Plan], plan: Plan, space: Space) -> list[Plan]:
    """Those that pins allow, once each, and not the plan itself."""
    return [other for other in dict.fromkeys(plans) if other != plan and space.allows(other)]


def _scheduled(plan: Plan, space: Space) -> list[Plan]:
    """The plan under its own schedule where that can have its virtual stages, else under those that can."""
    choices = quick_schedules(plan, space)
    return [plan] if plan.schedule in choices else [replace(plan, schedule=choice) for choice in choices]


def _laid_out(
    plan: Plan, space: Space, module: ModuleConfig, ranks: RankSet, layout: Layout, *, units: bool = True
) -> list[Plan]:
    """The plan with the module in this layout, as split and recomputed as it was where that is possible."""
    placed, backbone = plan.modules[module.name], space.workload.backbone
    splits = space.sequence_parallel(module, layout)
    if not splits:
        return []
    split = placed.sequence_parallel if placed.sequence_parallel in splits and placed.layout.tp > 1 else splits[0]
    other = replace(placed, ranks=ranks, layout=layout, sequence_parallel=split)
    moved = _with(plan, {module.name: other})
    if module is backbone:
        dp = other.layout.dp
        sizes = space.micro_batch_sizes(dp)
        found = []
        for size in sizes:
            found += [replace(moved, micro_batch_size=size), _keeping_units(moved, backbone.name, size)]
        return [each for one in dict.fromkeys(found) for each in _scheduled(one, space)]
    counts: tuple[int, ...] = (placed.unit,)
    if units:
        microbatches = plan.num_microbatches(backbone.name)
        counts = space.units(module, microbatches, plan.modules[backbone.name].layout.pp)
    found = [_with(plan, {module.name: replace(other, unit=unit)}) for unit in dict.fromkeys((placed.unit, *counts))]
    return [each for one in found for each in _scheduled(one, space)]


def _keeping_units(plan: Plan, backbone: str, size: int) -> Plan:
    """With this micro-batch size, and units that cover about as many samples as before."""
    factor = plan.micro_batch_size / size
    changes = {
        name: replace(placed, unit=max(1, round(placed.unit * factor)))
        for name, placed in plan.modules.items()
        if name != backbone and placed.unit > 1
    }
    return replace(_with(plan, changes), micro_batch_size=size)


def _rank_sets(plan: Plan, space: Space, module: ModuleConfig) -> list[RankSet]:
    """Sets worth trying for a module: all runs on a small cluster; else by size, where others begin or end. Of those
    that overlap every other lane alike, the first."""
    n, pinned = space.cluster.num_ranks, space.config.pin.of(module.name).rank_set
    if pinned is not None:
        return [] if plan.modules[module.name].ranks == pinned else [pinned]
    if n <= SMALL_RANKS:
        sets = list(space.rank_sets(module))
    else:
        placed = [p.ranks for name, p in plan.modules.items() if name != module.name]
        starts = sorted({0, *(r.first for r in placed), *(r.last + 1 for r in placed)})
        sets = [r for r in dict.fromkeys(p.ranks for p in plan.modules.values())]
        for size in space.sizes():
            sets += [RankSet.block(start, size) for start in dict.fromkeys((*starts, n - size)) if start + size <= n]
    others = [p.stage_ranks(i) for name, p in plan.modules.items() if name != module.name for i in range(p.layout.pp)]
    seen, found = set(), []
    for ranks in sets:
        overlaps = (len(ranks), *(_num_common(ranks, other) for other in others))
        if ranks != plan.modules[module.name].ranks and overlaps not in seen:
            seen.add(overlaps)
            found.append(ranks)
    return found


def _num_common(one: RankSet, other: RankSet) -> int:
    """Ranks that are in both."""
    spans = product(one.spans, other.spans)
    return sum(max(0, min(stop, end) - max(first, begin)) for (first, stop), (begin, end) in spans)
