"""The search: start from the best sketches of each shape, then improve one thing at a time while it pays.

    phase 1  sketch      priced modules put together by arithmetic: the fastest of each shape that fit, and the leanest
    phase 2  start       those under every schedule, simulated: the best of each shape; small clusters: every baseline,
                         and the best of modules on any ranks, overlaid
    phase 3  schedule    another one, with other units
    phase 4  layout      per module; of the backbone with the micro-batch
    phase 5  detail      virtual stages, sequence parallelism, recomputation
    phase 6  ranks       per module, other ranks with the layouts there
    phase 7  micro-batch
    phase 8  share       per module, where the cluster grants shares
    phase 9  pair        two modules moved at once, on small clusters
    phase 10 bubbles     schedules that are slow to build
    repeat 3-10 from the starts that are near the best until nothing gains `min_gain_frac`; the best end wins

Every improvement is yielded with its reason, so that a plan can be explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

from megatron_mosaic.cost_model.model import memory_limit_bytes
from megatron_mosaic.errors import MosaicError, PlanError
from megatron_mosaic.plan import ModulePlan, Plan
from megatron_mosaic.plan.validate import MAX_ACTIONS
from megatron_mosaic.search import moves
from megatron_mosaic.search.baselines import BASELINES, best_baseline, homogeneous_plans
from megatron_mosaic.search.evaluate import Candidate, Evaluator, Verdict, best_of, estimated
from megatron_mosaic.search.refused.miss import Miss
from megatron_mosaic.search.refused.remedies import Remedy
from megatron_mosaic.search.sketches.compose import Composer, Sketch
from megatron_mosaic.search.space import Space
from megatron_mosaic.units import format_bytes

KEEP = 6  # sketches of each shape
MAX_STARTS = 12  # estimates that the start of a shape may cost
OVERLAID_RANKS = 16  # clusters on which modules are put on any ranks
OVERLAID = 60  # kinds of such plans that are told apart by arithmetic
PART = 20  # of them are looked at together
MAX_OVERLAID = 120  # estimates that the start of them may cost, without virtual stages, and with
FAR = 1.3  # an overlaid plan that is slower by its own estimate than this times the best ends the list
CHUNKED = 8  # of them get virtual stages
MAX_IMPROVED = 3  # starts that moves go on from
NEAR = 1.15  # starts that are slower by more than this than the best plan so far are not improved
_MAY_PAY = 0.9  # plans that recompute are sketched where without limits of memory one would be as fast as this
PHASES: tuple[tuple[str, moves.Moves], ...] = (
    ("schedule", moves.schedule_moves),
    ("layout", moves.layout_moves),
    ("detail", moves.detail_moves),
    ("ranks", moves.rank_moves),
    ("micro-batch", moves.micro_batch_moves),
    ("share", moves.share_moves),
    ("pair", moves.pair_moves),
    ("bubbles", moves.bubble_moves),
)


class NoFeasiblePlan(PlanError):
    """The search has an answer, and it is no (exit status 1).

    `miss`: where memory is the reason, the plan that came nearest. `remedy`: what makes one fit, where that was looked
    for.
    """

    is_answer = True

    def __init__(
        self,
        where: str,
        *,
        got: object,
        expected: str,
        fix: str,
        miss: Miss | None = None,
        remedy: Remedy | None = None,
    ) -> None:
        super().__init__(where, got=got, expected=expected, fix=str(remedy or fix))
        self.miss, self.remedy = miss, remedy

    def with_remedy(self, remedy: Remedy) -> NoFeasiblePlan:
        return NoFeasiblePlan(
            self.where, got=self.got, expected=self.expected, fix=self.fix, miss=self.miss, remedy=remedy
        )

    def as_dict(self) -> dict[str, Any]:
        """The four parts, `nearest` and `remedy`; null where there is none."""
        found = {"nearest": self.miss, "remedy": self.remedy}
        return {**super().as_dict(), **{key: each and each.as_dict() for key, each in found.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The search's best plan so far on one way, and why it was taken."""

    plan: Plan
    step_s: float
    reason: str


def search_greedy(space: Space, evaluator: Evaluator, *, is_over: Callable[[], bool] = lambda: False) -> Iterator[Step]:
    """Steps from each start to its end; the last step is the best plan. NoFeasiblePlan when there is none.

    `is_over` says when the best plan so far has to do.
    """
    best: Step | None = None
    last: Step | None = None
    composer = evaluator.composer(space, recomputes=1)
    starts = sorted(_starts(space, evaluator, composer, is_over), key=lambda pair: pair[1].step_s)
    for name, start in starts[:MAX_IMPROVED]:
        if best is not None and (is_over() or start.step_s > NEAR * best.step_s):
            break
        last = Step(plan=start.plan, step_s=start.step_s, reason=f"start: best {name} plan")
        yield last
        for better in _improve(last, space, evaluator, composer, is_over):
            last = better
            yield last
        if best is None or last.step_s < best.step_s:
            best = last
    if best is None:
        raise infeasible(space, evaluator)
    if best is not last:
        yield replace(best, reason="the better of the ends")


def _starts(
    space: Space, evaluator: Evaluator, composer: Composer, is_over: Callable[[], bool]
) -> Iterator[tuple[str, Candidate]]:
    """(family, its best plan); when time is over, those that there are, or else the first that is found."""
    sketches = list_sketches(space, evaluator, composer)
    found = False
    for shape in dict.fromkeys(sketch.shape for sketch in sketches):
        if found and is_over():
            return
        plans = [p for sketch in sketches if sketch.shape is shape for p in under_schedules(sketch.plan, space)]
        if best := best_of(plans, evaluator, most=MAX_STARTS):
            found = True
            yield shape.value, best
    if space.cluster.num_ranks <= OVERLAID_RANKS:
        if best := _overlaid(space, evaluator, is_over, found):
            found = True
            yield "overlaid", best
    if space.is_small or not found:
        for name in BASELINES:
            if found and is_over():
                return
            if best := best_baseline(name, space, evaluator):
                found = True
                yield name, best
        return
    if is_over():
        return
    if best := best_of([p for p in homogeneous_plans(space) if space.allows(p)], evaluator):
        yield "homogeneous", best


def _overlaid(space: Space, evaluator: Evaluator, is_over: Callable[[], bool], found: bool) -> Candidate | None:
    """The best of the leading plans of modules on any ranks, under every schedule, and with virtual stages; when time
    is over and a plan was `found`, here or before, of those that were looked at."""
    leading = list[tuple[float, Plan]]()

    def ends() -> bool:
        return (found or bool(leading)) and is_over()

    overlaid = evaluator.composer(space).overlaid(OVERLAID, ends)
    for part in batched(overlaid, PART):
        best_s = min((step_s for step_s, _ in leading), default=math.inf)
        if len(leading) > MAX_OVERLAID or part[0].step_s > FAR * best_s or ends():
            break
        plans = [p for each in part for p in under_schedules(each.plan, space)]
        timed = estimated(plans, evaluator, below_s=NEAR * best_s, most=math.inf)
        leading += [pair for pair in timed if pair[0] < math.inf]
    near = [plan for _, plan in sorted(leading, key=lambda pair: pair[0])]
    more = [] if ends() else [other for each in near[:CHUNKED] for other in chunked(each, space)]
    return best_of(near + more, evaluator, most=MAX_OVERLAID)


def list_sketches(space: Space, evaluator: Evaluator, composer: Composer) -> list[Sketch]:
    """Sketches that recompute nothing, and those that do where that may pay: as far as they are near the best."""
    sketches = composer.sketches(KEEP)
    best_s = min((s.step_s for s in sketches if evaluator.fits(s.bytes)), default=math.inf)
    if composer.unlimited_s < _MAY_PAY * best_s:
        more = evaluator.composer(space).sketches(KEEP)
        sketches = sorted(dict.fromkeys(sketches + more), key=lambda s: s.step_s)
    fitting = [s for s in sketches if evaluator.fits(s.bytes)]
    near = [s for s in fitting if s.step_s <= NEAR * fitting[0].step_s]
    return near if len(near) >= KEEP else sketches


def under_schedules(plan: Plan, space: Space) -> list[Plan]:
    """The plan under every schedule, with its units and those that nest by the length of the pipeline."""
    backbone = space.workload.backbone.name
    pp = plan.modules[backbone].layout.pp
    whole = {n: p if n == backbone else replace(p, unit=pp) for n, p in plan.modules.items()}
    plans = [
        other
        for choice in moves.quick_schedules(plan, space)
        for other in (replace(plan, schedule=choice), replace(plan, schedule=choice, modules=whole))
    ]
    return [each for each in dict.fromkeys(plans) if space.allows(each)]


def chunked(plan: Plan, space: Space) -> list[Plan]:
    """The plan with virtual stages of one of its modules, and of all that can have some."""
    found, most = list[Plan](), dict[str, ModulePlan]()
    for module in space.workload.modules:
        placed = plan.modules[module.name]
        for layout in [x for x in space.chunked(module, placed.layout) if x.vpp > 1]:
            most[module.name] = replace(placed, layout=layout)
            found.append(replace(plan, modules={**plan.modules, module.name: most[module.name]}))
    if len(most) > 1:
        found.append(replace(plan, modules={**plan.modules, **most}))
    plans = [replace(each, schedule=choice) for each in found for choice in moves.quick_schedules(each, space)]
    return [each for each in dict.fromkeys(plans) if space.allows(each)]


def _improve(
    step: Step, space: Space, evaluator: Evaluator, composer: Composer, is_over: Callable[[], bool]
) -> Iterator[Step]:
    gained = True
    while gained:
        gained = False
        for name, moves_of in PHASES:
            if name in ("pair", "bubbles") and gained:
                continue  # single moves are cheaper: first to their end
            for plans in moves_of(step.plan, space, composer):
                if is_over():
                    return
                found = best_of(plans, evaluator, below_s=step.step_s * (1 - space.config.min_gain_frac))
                if found is not None:
                    reason = f"{name}: {_difference(step.plan, found.plan)}"
                    step, gained = Step(plan=found.plan, step_s=found.step_s, reason=reason), True
                    yield step
                    break  # the other moves start from the new plan


def _difference(before: Plan, after: Plan) -> str:
    """What changed, in words."""
    changes = []
    for name, new in after.modules.items():
        old = before.modules[name]
        for what, ours, theirs in (
            ("on ranks ", new.ranks, old.ranks),
            ("", new.layout, old.layout),
            ("share ", f"{new.quota.share:g}", f"{old.quota.share:g}"),
            ("unit ", new.unit, old.unit),
            ("recompute ", new.recompute.value, old.recompute.value),
            ("sequence parallel ", new.sequence_parallel, old.sequence_parallel),
        ):
            if ours != theirs:
                changes.append(f"{name} {what}{ours} (was {theirs})")
    if after.micro_batch_size != before.micro_batch_size:
        changes.append(f"micro-batch {after.micro_batch_size} (was {before.micro_batch_size})")
    if after.schedule != before.schedule:
        changes.append(f"{after.schedule} (was {before.schedule})")
    return ", ".join(changes)


def infeasible(space: Space, evaluator: Evaluator) -> MosaicError:
    """Why there is no plan."""
    if evaluator.counts[Verdict.too_large]:
        limit_bytes = memory_limit_bytes(space.cluster, space.config.memory_frac)
        miss = evaluator.nearest_miss()
        return NoFeasiblePlan(
            "search: memory",
            got=miss or f"at least {format_bytes(evaluator.smallest_bytes)} on a rank",
            expected=f"at most {format_bytes(limit_bytes)} on some plan",
            fix="use more ranks, raise search.max_tp or search.max_pp, or lower the batch",
            miss=miss,
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
        expected="at least one plan within the pins and limits of search",
        fix=f"change workload.global_batch_size ({space.workload.global_batch_size}) or the number of ranks",
    )
