"""The module DAG as pipeline stages: what a schedule builder needs to know of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Stages per module, edges between modules, microbatches of a step, and which modules run backward."""

    num_stages: Mapping[str, int]
    edges: tuple[tuple[str, str], ...]
    units: Mapping[str, int]
    num_microbatches: int
    has_backward: frozenset[str]

    @classmethod
    def of(cls, plan: Plan, workload: Workload, num_microbatches: int) -> Chain:
        """Only edges between modules of the plan count. Virtual stages come with later schedules."""
        for name, module in plan.modules.items():
            if module.layout.vpp > 1:
                raise ScheduleError(
                    f"modules.{name}.layout.vpp",
                    got=module.layout.vpp,
                    expected=f"1 with schedule {plan.schedule!r}",
                    fix="set vpp: 1 (interleaved schedules are not built yet)",
                )
        return cls(
            num_stages={name: module.layout.pp for name, module in plan.modules.items()},
            edges=tuple((a, b) for a, b in workload.edge_pairs if a in plan.modules and b in plan.modules),
            units={name: module.unit or 1 for name, module in plan.modules.items()},
            num_microbatches=num_microbatches,
            has_backward=workload.has_backward,
        )

    def stages_after(self, module: str, stage: int) -> int:
        """Length of the longest way from this stage to the end of the DAG, in stages."""
        beyond = [1 + self.stages_after(target, 0) for source, target in self.edges if source == module]
        return self.num_stages[module] - 1 - stage + max(beyond, default=0)
