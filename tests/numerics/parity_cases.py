"""Plans of the reference model for parity checks, written as files. Loads the runtime before ranks are forked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tests.forked  # noqa: F401  one thread, before torch computes anything
from megatron_mosaic.any2any import pretrain  # noqa: F401  forked ranks inherit the imports
from megatron_mosaic.any2any.sizes import Any2AnySizes, workload
from megatron_mosaic.parity import reference_run  # noqa: F401
from megatron_mosaic.plan import Layout, Plan, Recompute
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.runtime import train  # noqa: F401
from megatron_mosaic.runtime.arguments import prepare_ranks
from tests.cases import make_plan

prepare_ranks()

WORKLOAD = workload(Any2AnySizes(), 1)
TEXT_HEAVY = ["--digits-text-only-frac", "0.7", "--digits-two-image-frac", "0.0"]

ALONE = ("0", Layout())


def any2any_plan(vision, llm, generator=ALONE, *, world_size=4, batch=12, micro_batch=2) -> Plan:
    """A plan from ("0-3", Layout(...)) for each module."""
    return make_plan(
        {"vision": vision, "llm": llm, "generator": generator},
        workload=WORKLOAD,
        world_size=world_size,
        global_batch_size=batch,
        micro_batch_size=micro_batch,
    )


SAME_RANKS = any2any_plan(("0-3", Layout(dp=4)), ("0-3", Layout(tp=2, dp=2)), ("0-3", Layout(dp=4)))
DISJOINT = any2any_plan(("0-1", Layout(dp=2)), ("2-3", Layout(tp=2)), ("2-3", Layout(tp=2)), batch=6)
OVERLAPPING = any2any_plan(("0-2", Layout(dp=3)), ("0-3", Layout(pp=2, dp=2)), ("3", Layout()))
GENERATOR_ELSEWHERE = any2any_plan(("0", Layout()), ("0-1", Layout(dp=2)), ("2-3", Layout(dp=2)))
PIPELINES = any2any_plan(("0-3", Layout(pp=4)), ("0-3", Layout(tp=2, pp=2)), ("1-3", Layout(dp=3)), batch=8)
IDLE_RANK = any2any_plan(("0", Layout()), ("1", Layout()), ("0", Layout()), world_size=3, batch=4)
SCATTERED = any2any_plan(("0,2", Layout(dp=2)), ("1,3", Layout(tp=2)), ("0,3", Layout(pp=2)), batch=6)
TENSOR_TO_TENSOR = any2any_plan(
    ("0-3", Layout(tp=4)), ("0-3", Layout(tp=2, dp=2)), ("0-3", Layout(tp=2, pp=2)), micro_batch=1
)
# Two modules whose stages share a pair of ranks: their hidden states must not overtake each other.
SHARED_PIPELINE = any2any_plan(("0-1", Layout(pp=2)), ("2", Layout()), ("0-1", Layout(pp=2)), world_size=3, batch=8)
SAME_PIPELINE = any2any_plan(("0-1", Layout(pp=2)), ("0-1", Layout(pp=2)), ("0", Layout()), world_size=2, batch=8)
ONE_RANK = any2any_plan(ALONE, ALONE, world_size=1, batch=4)
TWO_RANKS = any2any_plan(("0-1", Layout(dp=2)), ("0-1", Layout(tp=2)), ("1", Layout()), world_size=2, batch=4)


def recomputed(plan: Plan) -> Plan:
    """The same plan with full recomputation of the llm."""
    llm = replace(plan.modules["llm"], recompute=Recompute.full)
    return replace(plan, modules={**plan.modules, "llm": llm})


def split_over_tp(plan: Plan) -> Plan:
    """The same plan with sequence parallelism wherever tp is above 1."""
    split = {name: replace(m, sequence_parallel=m.layout.tp > 1) for name, m in plan.modules.items()}
    return replace(plan, modules=split)


def written(plan: Plan, directory: Path) -> str:
    """The plan's file."""
    path = directory / "plan.yaml"
    save_plan(plan, path)
    return str(path)
