"""The plan: which module runs where, in which layout, with which share of a GPU, in which order.

The planner writes it without a GPU, the runtime obeys it without a search. `plan_file.py` reads and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan.layout import ModulePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the planner expected. Ignored by the runtime."""

    step_s: float
    peak_bytes: float
    cost_model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole plan. Legal in itself; `validate_plan` says whether it fits a workload and a cluster."""

    workload: str
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    schedule: str
    modules: Mapping[str, ModulePlan]
    digest: str = ""  # of the workload the plan was made for; empty: not recorded
    predicted: Prediction | None = None

    def __post_init__(self) -> None:
        for key in ("world_size", "global_batch_size", "micro_batch_size"):
            if getattr(self, key) < 1:
                raise PlanError(key, got=getattr(self, key), expected="at least 1", fix=f"set {key}")
        if not self.modules:
            raise PlanError("modules", got="none", expected="at least one module", fix="list the modules")
        for name, module in self.modules.items():
            if module.ranks.ranks[-1] >= self.world_size:
                raise PlanError(
                    f"modules.{name}.ranks",
                    got=f"rank {module.ranks.ranks[-1]} ({module.ranks})",
                    expected=f"ranks below world_size {self.world_size}",
                    fix=f"raise world_size to {module.ranks.ranks[-1] + 1}, or move {name}",
                )

    def modules_on(self, rank: int) -> tuple[str, ...]:
        """Names of the modules that have a lane on this rank, in the plan's order."""
        return tuple(name for name, module in self.modules.items() if rank in module.ranks.ranks)

    @property
    def every_rank_runs_all(self) -> bool:
        """Whether no module leaves a rank out."""
        return all(len(module.ranks.ranks) == self.world_size for module in self.modules.values())

    def num_microbatches(self, backbone: str) -> int:
        """Backbone microbatches per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.modules[backbone].layout.dp)
