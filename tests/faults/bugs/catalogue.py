"""Numeric bugs as small patches of the runtime: what a check has to catch. `listed.py` has all of them.

Planted on every rank of a plan before it trains, never in the reference. Each case is a plan with arguments; a bug goes
into the case that has what it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest

from megatron_mosaic.plan import Layout, Plan
from megatron_mosaic.plan.training import Sharding, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from tests.numerics import acceptance_cases, parity_cases

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]

BASE = parity_cases.split_over_tp(parity_cases.TWO_RANKS)
BASE = replace(BASE, micro_batch_size=4, global_batch_size=8)
PIPELINE = parity_cases.any2any_plan(("0-1", Layout(pp=2)), ("0-1", Layout(pp=2)), world_size=2, batch=8)
CONTEXT = parity_cases.any2any_plan(("0-1", Layout(cp=2)), ("0-1", Layout(cp=2)), world_size=2, batch=4)
EXPERTS = acceptance_cases.case("bugs", "experts", acceptance_cases.MOE, image="0-1 dp2 ep2", llm="0-1 dp2 ep2", mbs=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What bugs are planted into."""

    plan: Plan
    words: tuple[str, ...] = ()
    workload: Workload | None = None  # made-up data instead of digits


CASES: Mapping[str, Case] = {
    "base": Case(plan=BASE),
    "frozen vision": Case(plan=BASE, words=("--freeze", "vision")),
    "warm-up, own rate": Case(
        plan=BASE,
        words=("--lr-warmup-iters", "1", "--lr-decay-style", "cosine", "--mosaic-lr-mult", "vision=0.5"),
    ),
    "sharded optimizer": Case(plan=replace(BASE, training=TrainingSetup(sharding=Sharding.optimizer))),
    "pipelines": Case(plan=PIPELINE),
    "context parallel": Case(plan=CONTEXT, words=("--position-embedding-type", "rope")),
    "experts": Case(plan=EXPERTS.plan, workload=EXPERTS.workload),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A patch that changes what a plan computes."""

    name: str
    case: str
    plant: Plant


BUGS: list[Bug] = []


def bug(name: str, case: str = "base") -> Callable[[Plant], Plant]:
    """Put a plant on the list."""

    def put(plant: Plant) -> Plant:
        BUGS.append(Bug(name=name, case=case, plant=plant))
        return plant

    return put
