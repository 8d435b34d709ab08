"""The plan of modules that are measured on one rank, without anybody beside it."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice


def one_rank_plan(
    workload: str, modules: Iterable[str], *, global_batch_size: int = 1, micro_batch_size: int = 1
) -> Plan:
    """All modules undivided on rank 0, in turns."""
    alone = ModulePlan(ranks=RankSet.of((0,)), layout=Layout())
    return Plan(
        workload=workload,
        world_size=1,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        schedule=ScheduleChoice("1f1b"),
        modules=dict.fromkeys(modules, alone),
    )
