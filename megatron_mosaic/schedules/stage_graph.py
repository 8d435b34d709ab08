"""The module DAG as pipeline stages: what a schedule builder needs to know of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraph:
    """Stages per module (and virtual stages on each), edges, microbatches of a step, and which modules run backward."""

    num_stages: Mapping[str, int]
    edges: tuple[tuple[str, str], ...]
    units: Mapping[str, int]
    num_microbatches: int
    has_backward: frozenset[str]
    num_chunks: Mapping[str, int] = field(default_factory=dict)  # left out: 1

    @classmethod
    def of(cls, plan: Plan, workload: Workload, num_microbatches: int) -> StageGraph:
        """Only edges between modules of the plan count."""
        return cls(
            num_stages={name: module.layout.pp for name, module in plan.modules.items()},
            edges=tuple((a, b) for a, b in workload.edge_pairs if a in plan.modules and b in plan.modules),
            units={name: module.unit or 1 for name, module in plan.modules.items()},
            num_microbatches=num_microbatches,
            has_backward=workload.has_backward,
            num_chunks={name: module.layout.vpp for name, module in plan.modules.items() if module.layout.vpp > 1},
        )

    def chunks(self, module: str) -> int:
        return self.num_chunks.get(module, 1)

    def num_units(self, module: str) -> int:
        return -(-self.num_microbatches // self.units[module])

    def require_no_chunks(self, schedule: str) -> None:
        """ScheduleError if a module has virtual stages."""
        for name, count in self.num_chunks.items():
            raise ScheduleError(
                f"modules.{name}.layout.vpp",
                got=count,
                expected=f"1 with schedule {schedule!r}",
                fix="set vpp: 1, or schedule: interleaved",
            )

    def stages_after(self, module: str, stage: int) -> int:
        """Length of the longest way from this stage to the end of the DAG, in stages."""
        beyond = [1 + self.stages_after(target, 0) for source, target in self.edges if source == module]
        return self.num_stages[module] - 1 - stage + max(beyond, default=0)
