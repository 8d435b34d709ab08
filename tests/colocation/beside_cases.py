"""Plans of the reference model whose modules run beside each other, for runs under Megatron."""

from __future__ import annotations

from dataclasses import replace

from megatron_mosaic.plan import Layout, Plan, ScheduleChoice
from megatron_mosaic.plan.quota import Quota
from tests.numerics.parity_cases import any2any_plan


def beside(plan: Plan, **quotas: float) -> Plan:
    """The plan under `overlap`, with these quotas."""
    modules = {name: replace(m, quota=Quota(share=quotas.get(name, 1.0))) for name, m in plan.modules.items()}
    return replace(plan, schedule=ScheduleChoice("overlap"), modules=modules)


ONE_RANK = beside(any2any_plan(("0", Layout()), ("0", Layout()), world_size=1, batch=8), vision=0.4, llm=0.6)
TWO_RANKS = beside(
    any2any_plan(("0-1", Layout(dp=2)), ("0-1", Layout(tp=2)), ("0-1", Layout(dp=2)), world_size=2, batch=8),
    vision=0.3,
    llm=0.4,
    generator=0.3,
)
