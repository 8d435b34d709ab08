"""Step time of candidate plans: bounds first, the simulator only for plans that could still win."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_mosaic.cost_model.model import CostModel, memory_limit_bytes
from megatron_mosaic.cost_model.price import StepPrice
from megatron_mosaic.cost_model.simulate import Simulation, estimate_step, simulate, simulate_planned
from megatron_mosaic.errors import PlanError, ProfileError, QuotaError, ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.layout import Recompute
from megatron_mosaic.plan.validate import MAX_ACTIONS, count_actions, validate_plan
from megatron_mosaic.schedules.plan_match import require_shares
from megatron_mosaic.search.refused.miss import Miss
from megatron_mosaic.search.sketches.compose import Composer
from megatron_mosaic.search.space import Space

MAX_MISSES = 8  # of plans that are too large are simulated to name the nearest
MAX_ESTIMATES = 24  # of one list of candidates, those of the lowest bounds
ESTIMATE_MARGIN = 1.02  # estimates within this factor of the best are simulated; the most one was too high is 0.4 %


class Verdict(StrEnum):
    """What became of a candidate."""

    simulated = "simulated"
    too_slow = "too slow by its lower bound"
    too_large = "needs more memory than a device has"
    too_long = "has more actions in a step than can be laid out"
    not_measured = "the profile has no point for it"
    illegal = "cannot run, or its schedule cannot order it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a whole simulated step came to."""

    step_s: float
    peak_bytes: float


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Asks the cost model about plans and remembers the answers. `counts` says what became of how many plans.

    `outcomes`: of every plan that was simulated, also those that are too large. `unmeasured` is the first error of a
    plan that the profile has no point for.
    """

    model: CostModel
    memory_frac: float
    outcomes: dict[Plan, Outcome] = field(default_factory=dict)
    counts: Counter[Verdict] = field(default_factory=Counter)
    unmeasured: ProfileError | None = None
    _estimate_s: dict[Plan, float] = field(default_factory=dict)
    _step_s: dict[Plan, float] = field(default_factory=dict)
    _bound_s: dict[Plan, float] = field(default_factory=dict)
    _prices: dict[Plan, StepPrice] = field(default_factory=dict)
    _composers: dict[tuple[Space, int], Composer] = field(default_factory=dict)
    _large_bytes: dict[Plan, float] = field(default_factory=dict)  # of those that were too large, what they need

    def bound_s(self, plan: Plan) -> float:
        """No step of this plan is faster; infinite when it is infeasible. No schedule is built."""
        if plan not in self._bound_s:
            self._bound_s[plan] = self._guard(plan, self._bound)
        return self._bound_s[plan]

    def step_s(self, plan: Plan, *, below_s: float = math.inf) -> float:
        """Seconds of a step; infinite when the plan is infeasible or provably not faster than `below_s`."""
        if plan not in self._step_s:
            bound_s = self.bound_s(plan)
            if bound_s >= below_s:
                self.counts[Verdict.too_slow] += bound_s < math.inf
                return math.inf
            self._step_s[plan] = self._guard(plan, self._simulated)
        return self._step_s[plan]

    def estimate_s(self, plan: Plan) -> float:
        """A close guess of `step_s` that costs little on steps of many microbatches."""
        if plan not in self._estimate_s:
            feasible = self.bound_s(plan) < math.inf
            self._estimate_s[plan] = self._guard(plan, self._estimated) if feasible else math.inf
        return self._estimate_s[plan]

    def simulate(self, plan: Plan) -> Simulation:
        """The whole simulation of one plan."""
        return simulate(plan, self.model)

    def composer(self, space: Space, *, recomputes: int = len(Recompute)) -> Composer:
        """The sketches of a space (which pins belong to), priced once."""
        key = space, recomputes
        if key not in self._composers:
            self._composers[key] = Composer(space, self.model, recomputes=recomputes)
        return self._composers[key]

    @property
    def evaluated(self) -> int:
        """Different plans that were priced."""
        return len(self._bound_s)

    @property
    def smallest_bytes(self) -> float:
        """What the smallest of the plans that were too large would need."""
        return min(self._large_bytes.values(), default=math.inf)

    def smallest_of(self, plans: Iterable[Plan]) -> Candidate | None:
        """Of those that were too large, but can run otherwise, the one that needs least."""
        large = [plan for plan in plans if plan in self._large_bytes]
        for plan in sorted(large, key=self._large_bytes.__getitem__):
            step_s = self._guard(plan, lambda each: self.simulate(each).step_s)
            if step_s < math.inf:
                return Candidate(plan=plan, step_s=step_s)
        return None

    def nearest_miss(self) -> Miss | None:
        """Of the plans that were too large and need least as far as is known, the one with the smallest peak."""
        misses: list[Miss] = []
        for plan in sorted(self._large_bytes, key=self._large_bytes.__getitem__)[:MAX_MISSES]:
            try:
                misses.append(Miss.of(plan, self.simulate(plan)))
            except (PlanError, QuotaError, ScheduleError):
                self.counts[Verdict.illegal] += 1
        return min(misses, key=lambda miss: miss.num_bytes, default=None)

    def fits(self, num_bytes: float) -> bool:
        """Whether a rank may hold so much."""
        return num_bytes <= memory_limit_bytes(self.model.cluster, self.memory_frac)

    def _bound(self, plan: Plan) -> float:
        if count_actions(plan, self.model.workload.backbone.name) > MAX_ACTIONS:
            self.counts[Verdict.too_long] += 1
            return math.inf
        validate_plan(plan, self.model.workload, self.model.cluster)
        price = self._prices[plan] = self.model.price(plan)
        require_shares(plan, price.work.graph.lane_tracks)
        return price.lower_bound_s if self._fits(plan, price.lower_bound_bytes) else math.inf

    def _estimated(self, plan: Plan) -> float:
        estimate = estimate_step(self._prices[plan])
        if not estimate.added_s:
            self._step_s[plan] = self._keep(plan, estimate.simulation)
            return self._step_s[plan]
        return estimate.step_s if self._fits(plan, estimate.simulation.peak_bytes) else math.inf

    def _simulated(self, plan: Plan) -> float:
        return self._keep(plan, simulate_planned(self._prices[plan]))

    def _keep(self, plan: Plan, simulation: Simulation) -> float:
        """What a whole simulation says."""
        outcome = self.outcomes[plan] = Outcome(step_s=simulation.step_s, peak_bytes=simulation.peak_bytes)
        self.counts[Verdict.simulated] += 1
        return outcome.step_s if self._fits(plan, outcome.peak_bytes) else math.inf

    def _fits(self, plan: Plan, num_bytes: float) -> bool:
        if self.fits(num_bytes):
            return True
        self.counts[Verdict.too_large] += 1
        self._large_bytes[plan] = num_bytes
        return False

    def _guard(self, plan: Plan, estimate: Callable[[Plan], float]) -> float:
        """The estimate, or infinity where the profile has no point for the plan, or it cannot run."""
        try:
            return estimate(plan)
        except ProfileError as error:
            self.counts[Verdict.not_measured] += 1
            self.unmeasured = self.unmeasured or error
            return math.inf
        except (PlanError, QuotaError, ScheduleError):
            self.counts[Verdict.illegal] += 1
            return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan with its predicted step."""

    plan: Plan
    step_s: float


def best_of(
    plans: Iterable[Plan], evaluator: Evaluator, *, below_s: float = math.inf, most: float = MAX_ESTIMATES
) -> Candidate | None:
    """The fastest feasible plan that beats `below_s`; the first of equals. `most`: estimates that it may cost.

    Lower bounds decide who is estimated, estimates decide who is simulated, the simulator decides.
    """
    best: Candidate | None = None
    for estimate_s, plan in estimated(plans, evaluator, below_s=below_s, most=most):
        if estimate_s >= ESTIMATE_MARGIN * below_s:
            break
        step_s = evaluator.step_s(plan, below_s=below_s)
        if step_s < below_s:
            best, below_s = Candidate(plan=plan, step_s=step_s), step_s
    return best


def estimated(
    plans: Iterable[Plan], evaluator: Evaluator, *, below_s: float = math.inf, most: float = MAX_ESTIMATES
) -> list[tuple[float, Plan]]:
    """(estimate, plan) of those that could be the fastest and beat `below_s` by their bounds, fastest first; the first
    `most` by their bounds."""
    estimates: list[tuple[float, Plan]] = []
    rival_s = below_s
    for bound_s, plan in sorted(((evaluator.bound_s(plan), plan) for plan in plans), key=lambda pair: pair[0]):
        if bound_s >= rival_s or len(estimates) >= most:
            evaluator.counts[Verdict.too_slow] += bound_s < math.inf
            continue
        estimates.append((evaluator.estimate_s(plan), plan))
        rival_s = min(rival_s, ESTIMATE_MARGIN * estimates[-1][0])
    return sorted(estimates, key=lambda pair: pair[0])
