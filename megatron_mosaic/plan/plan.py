"""The plan: which module runs where, in which layout, with which share of a GPU, in which order.

The planner writes it without a GPU, the runtime obeys it without a search. `plan_file.py` reads and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan.layout import ModulePlan
from megatron_mosaic.plan.training import TrainingSetup

# Schedules that lay whole units of other modules around the backbone, and those that run modules of one rank at once
NESTING = frozenset({"three_phase", "nested", "overlap", "bubble_fill"})
CONCURRENT = frozenset({"overlap"})


@dataclass(frozen=True, slots=True)
class ScheduleChoice:
    """Which builder orders the work, and its parameters; what a builder does not know it refuses."""

    name: str
    parameters: FrozenMap[str, int] = field(default_factory=FrozenMap)

    def __str__(self) -> str:
        chosen = ", ".join(f"{key} {value}" for key, value in self.parameters.items())
        return f"{self.name} ({chosen})" if chosen else self.name


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
    schedule: ScheduleChoice
    modules: Mapping[str, ModulePlan]  # made a FrozenMap, so that a plan can be a key
    digest: str = ""  # of the workload the plan was made for; empty: not recorded
    cluster: str | FrozenMap[str, Any] = ""  # a shipped name, or all values as in conf/cluster; empty: not recorded
    training: TrainingSetup | None = None  # None: not recorded
    predicted: Prediction | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", FrozenMap(self.modules))
        for key in ("world_size", "global_batch_size", "micro_batch_size"):
            if getattr(self, key) < 1:
                raise PlanError(key, got=getattr(self, key), expected="at least 1", fix=f"set {key}")
        if not self.modules:
            raise PlanError("modules", got="none", expected="at least one module", fix="list the modules")
        for name, module in self.modules.items():
            if module.ranks.last >= self.world_size:
                raise PlanError(
                    f"modules.{name}.ranks",
                    got=f"rank {module.ranks.last} ({module.ranks})",
                    expected=f"ranks below world_size {self.world_size}",
                    fix=f"raise world_size to {module.ranks.last + 1}, or move {name}",
                )

    def modules_on(self, rank: int) -> tuple[str, ...]:
        """Names of the modules that have a lane on this rank, in the plan's order."""
        return tuple(name for name, module in self.modules.items() if rank in module.ranks)

    @property
    def every_rank_runs_all(self) -> bool:
        """Whether no module leaves a rank out."""
        return all(len(module.ranks) == self.world_size for module in self.modules.values())

    def units(self, backbone: str) -> FrozenMap[str, int]:
        """Module -> backbone microbatches that one of its actions covers. Where the plan does not say, the schedule
        decides: those that nest modules around the pipeline take as many as it has stages, so that no rank is left
        without an item of a unit; the others one."""
        default = self.modules[backbone].layout.pp if self.schedule.name in NESTING else 1
        return FrozenMap(
            {name: placed.unit or (1 if name == backbone else default) for name, placed in self.modules.items()}
        )

    def tracks(self, backbone: str) -> FrozenMap[str, int]:
        """Module -> its track, for those that run beside others of their ranks: under a schedule that does so, modules
        that have a quota, where another one with a quota shares ranks. The backbone and all others take turns."""
        found: list[str] = []
        if self.schedule.name in CONCURRENT:
            limited = {name: placed for name, placed in self.modules.items() if placed.quota.share < 1}
            found = [
                name
                for name, placed in limited.items()
                if name != backbone
                and any(other != name and placed.ranks.overlaps(limited[other].ranks) for other in limited)
            ]
        return FrozenMap({name: track for track, name in enumerate(found, start=1)})

    def num_microbatches(self, backbone: str) -> int:
        """Backbone microbatches per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.modules[backbone].layout.dp)
