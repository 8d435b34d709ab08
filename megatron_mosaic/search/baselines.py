"""What others would do, as plans: the best of each family on the same cost model and in the same space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan import CONCURRENT
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.search.evaluate import Candidate, Evaluator, best_of
from megatron_mosaic.search.pins import Pins
from megatron_mosaic.search.sketches.compose import Shape
from megatron_mosaic.search.space import Space

_SKETCHES = 8  # of each shape that are priced
_ROUNDING = 1e-5  # of shares, which have six decimals


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A family of plans: who runs it so, and its plans; `finish` makes variants of the best one."""

    source: str
    plans: Callable[[Space, Evaluator], Iterator[Plan]]
    finish: Callable[[Plan, Space], Iterator[Plan]] = field(default=lambda plan, space: iter(()))


def best_baseline(name: str, space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest feasible plan of a family, or None."""
    baseline = BASELINES[name]
    best = best_of((p for p in baseline.plans(space, evaluator) if space.allows(p)), evaluator)
    if best is None:
        return None
    better = [p for p in baseline.finish(best.plan, space) if space.allows(p)]
    return best_of(better, evaluator, below_s=best.step_s) or best


def homogeneous_plans(space: Space, evaluator: Evaluator | None = None) -> Iterator[Plan]:
    """All modules in one layout on as many ranks as they can fill, recomputed alike, without virtual stages."""
    modules = space.workload.modules
    for size in space.sizes():
        layouts = set.intersection(*(set(space.layouts(module, size)) for module in modules))
        for layout in sorted(layouts, key=lambda x: (x.tp, x.cp, x.pp)):
            yield from _alike(space, layout, RankSet.block(0, size))
        if layouts:
            return


def _alike(space: Space, layout: Layout, ranks: RankSet) -> Iterator[Plan]:
    modules = space.workload.modules
    splits = {m.name: space.sequence_parallel(m, layout)[:1] for m in modules}
    recomputes = {m.name: space.recomputes(m) for m in modules}
    if not all(splits.values()) or not all(recomputes.values()):
        return
    for again in recomputes[space.workload.backbone.name]:
        placed = {
            m.name: ModulePlan(
                ranks=ranks,
                layout=layout,
                unit=1,
                recompute=again if again in recomputes[m.name] else recomputes[m.name][0],
                sequence_parallel=splits[m.name][0],
            )
            for m in modules
        }
        for size in space.micro_batch_sizes(layout.dp):
            yield space.make_plan(size, placed, ScheduleChoice("1f1b"))


def _interleaved(plan: Plan, space: Space) -> Iterator[Plan]:
    """The plan with virtual stages of the backbone."""
    backbone = space.workload.backbone
    placed = plan.modules[backbone.name]
    for layout in space.chunked(backbone, placed.layout)[1:]:
        modules = {**plan.modules, backbone.name: replace(placed, layout=layout)}
        yield replace(plan, modules=modules, schedule=ScheduleChoice("interleaved"))


def encoder_first_plans(space: Space, evaluator: Evaluator) -> Iterator[Plan]:
    """Modules one behind the other as stages of one pipeline: the backbone's tp and dp for all, on their own ranks."""
    workload, n = space.workload, space.cluster.num_ranks
    for size in space.sizes():
        for layout in space.layouts(workload.backbone, size):
            for pp in (1, 2, 4):
                placed = _chain(space, layout, pp)
                if placed is not None and sum(len(p.ranks) for p in placed.values()) <= n:
                    for micro_batch in space.micro_batch_sizes(layout.dp):
                        yield space.make_plan(micro_batch, placed, ScheduleChoice("1f1b"))


def _chain(space: Space, backbone: Layout, pp: int) -> dict[str, ModulePlan] | None:
    """Blocks of ranks, one behind the other; None where a module cannot be laid out so, or ranks lack."""
    placed, first = dict[str, ModulePlan](), 0
    for module in space.workload.modules:
        layout = backbone
        if module is not space.workload.backbone:
            layout = Layout(tp=backbone.tp, pp=pp, dp=backbone.dp)
            if layout not in space.layouts(module, layout.num_ranks):
                return None
        splits, recomputes = space.sequence_parallel(module, layout), space.recomputes(module)
        if not splits or not recomputes or first + layout.num_ranks > space.cluster.num_ranks:
            return None
        placed[module.name] = ModulePlan(
            ranks=RankSet.block(first, layout.num_ranks),
            layout=layout,
            unit=1,
            recompute=recomputes[0],
            sequence_parallel=splits[0],
        )
        first += layout.num_ranks
    return placed


def _composed(shape: Shape, schedule: str, others: Mapping[str, Any]) -> Callable[[Space, Evaluator], Iterator[Plan]]:
    """The leading sketches of one shape under one schedule, with pins on every module beside the backbone."""

    def plans(space: Space, evaluator: Evaluator) -> Iterator[Plan]:
        pinned = _pinned(space, others)
        if ScheduleChoice(schedule) not in space.schedules(is_chunked=False):
            return
        for sketch in evaluator.composer(pinned).sketches(_SKETCHES):
            if sketch.shape is shape:
                plan = replace(sketch.plan, schedule=ScheduleChoice(schedule))
                yield from _shared(plan, space) if schedule in CONCURRENT else (plan,)

    return plans


def _shared(plan: Plan, space: Space) -> Iterator[Plan]:
    """The plan with every share for each module beside the backbone that leaves the backbone one."""
    backbone = space.workload.backbone.name
    beside = len(plan.modules) - 1
    grantable = [quota.share for quota in space.quotas()]
    for share in grantable[1:]:
        rest = round(1 - beside * share, 6)
        if any(abs(rest - each) < _ROUNDING for each in grantable):
            shares = {name: rest if name == backbone else share for name in plan.modules}
            modules = {name: replace(m, quota=Quota(share=shares[name])) for name, m in plan.modules.items()}
            yield replace(plan, modules=modules)


def _pinned(space: Space, others: Mapping[str, Any]) -> Space:
    """The space with pins on every module beside the backbone; the user's own pins win."""
    if not others:
        return space
    pin = space.config.pin.model_dump(exclude_none=True)

    def merged(module: ModuleConfig) -> dict[str, Any]:
        own = pin.get(module.name, {})
        return {**others, **own, "layout": {**others.get("layout", {}), **own.get("layout", {})}}

    modules = {m.name: merged(m) for m in space.workload.modules if m is not space.workload.backbone}
    return replace(space, config=replace(space.config, pin=Pins.model_validate({**pin, **modules})))


def schedule_plans(space: Space, name: str) -> Iterator[Plan]:
    """All modules on all ranks, in this schedule, as far as pins and exclusions allow: the backbone in at least two
    stages (two virtual ones each where the schedule interleaves), the others with as little tp as their layers and
    items allow, and one stage."""
    everyone = RankSet.block(0, space.cluster.num_ranks)
    backbone, config = space.workload.backbone, space.config
    others: dict[str, ModulePlan] = {}
    for module in space.workload.modules:
        if module is not backbone:
            flat = [layout for layout in space.layouts(module, len(everyone)) if layout.pp == 1]
            placed = [each for x in sorted(flat, key=lambda x: x.tp) for each in _usual(space, module, everyone, x)]
            if not placed:
                return
            others[module.name] = placed[0]
    vpp = 2 if name == "interleaved" else 1
    for layout in space.layouts(backbone, len(everyone)):
        if layout.pp == 1 or backbone.num_layers % (layout.pp * vpp):
            continue
        for own in _usual(space, backbone, everyone, replace(layout, vpp=vpp)):
            for size in space.micro_batch_sizes(layout.dp):
                plan = space.make_plan(size, {backbone.name: own, **others}, ScheduleChoice(name))
                if config.pin.allows(plan) and config.exclude.allows(plan, space.workload.has_backward):
                    yield plan


def _usual(space: Space, module: ModuleConfig, ranks: RankSet, layout: Layout) -> Iterator[ModulePlan]:
    """The module in this layout, split and recomputed as is usual; nothing where it cannot be. Without a pin the
    schedule decides what a unit is."""
    for split in space.sequence_parallel(module, layout)[:1]:
        for again in space.recomputes(module)[:1]:
            unit = space.config.pin.of(module.name).unit or 0
            yield ModulePlan(ranks=ranks, layout=layout, unit=unit, recompute=again, sequence_parallel=split)


def best_of_schedule(name: str, space: Space, evaluator: Evaluator) -> Candidate | None:
    """The fastest plan that fits; where none does, the one that needs least memory as far as is known; None where the
    schedule has no plan that can run. Every plan that could win is simulated: how much of it lives, no bound knows."""
    plans = sorted(schedule_plans(space, name), key=evaluator.bound_s)
    best: Candidate | None = None
    for plan in plans:
        step_s = evaluator.step_s(plan, below_s=best.step_s if best else math.inf)
        if step_s < (best.step_s if best else math.inf):
            best = Candidate(plan=plan, step_s=step_s)
    return best or evaluator.smallest_of(plans)


BASELINES: dict[str, Baseline] = {
    "homogeneous": Baseline(
        source="Megatron-LM (Narayanan et al. 2021, Korthikanti et al. 2022): one layout for all",
        plans=homogeneous_plans,
        finish=_interleaved,
    ),
    "encoder_first": Baseline(source="Megatron-LM: encoder as the first pipeline stages", plans=encoder_first_plans),
    "disaggregated": Baseline(
        source="DistTrain (arXiv 2408.04275): every module on its own ranks",
        plans=_composed(Shape.disjoint, "1f1b", {"unit": 1}),
    ),
    "bubble_filling": Baseline(
        source="Optimus (arXiv 2408.03505): encoder work in the backbone's bubbles",
        plans=_composed(Shape.colocated, "bubble_fill", {}),
    ),
    "three_phase": Baseline(
        source="MIMO (arXiv 2605.27678), colocated: all encoder forwards, backbone, all encoder backwards",
        plans=_composed(Shape.colocated, "three_phase", {"layout": {"pp": 1}}),
    ),
    "nested": Baseline(
        source="BigMac (arXiv 2605.25451): encoder units nested into the backbone's pipeline",
        plans=_composed(Shape.colocated, "nested", {"layout": {"pp": 1}}),
    ),
    "decoupled_encoder": Baseline(
        source="Kimi K2.5 (arXiv 2602.02276): encoders replicated on all ranks, their forward run again",
        plans=_composed(Shape.colocated, "three_phase", {"layout": {"tp": 1, "pp": 1}, "recompute": "whole"}),
    ),
    "spatial_sharing": Baseline(
        source="Mosaic (arXiv 2605.18710): modules beside each other on shares of a device",
        plans=_composed(Shape.colocated, "overlap", {"layout": {"pp": 1}}),
    ),
}
