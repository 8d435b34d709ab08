"""What the user has decided already: values that plans must have, and values that they must not.

search.pin.llm.layout.tp=8  search.pin.vision.ranks=0-15  search.pin.schedule=1f1b  search.exclude.schedule=[nested]
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, cast

from pydantic import ConfigDict, Field

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet
from megatron_mosaic.plan.layout import Recompute
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import Count
from megatron_mosaic.plan.yaml_text import Schema
from megatron_mosaic.schedules import SCHEDULES

Unit = Annotated[int, Field(strict=True, ge=0)]


class LayoutPin(Schema):
    tp: Count | None = None
    cp: Count | None = None
    pp: Count | None = None
    vpp: Count | None = None
    dp: Count | None = None
    ep: Count | None = None
    etp: Count | None = None

    def allows(self, layout: Layout) -> bool:
        return all(value in (None, getattr(layout, axis)) for axis, value in self)


class ModulePin(Schema):
    """Of one module; None: free."""

    ranks: str | int | None = None
    layout: LayoutPin = LayoutPin()
    unit: Unit | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool | None = None

    @property
    def rank_set(self) -> RankSet | None:
        return None if self.ranks is None else RankSet.parse(str(self.ranks))

    def allows(self, placed: ModulePlan) -> bool:
        return (
            self.rank_set in (None, placed.ranks)
            and self.layout.allows(placed.layout)
            and self.unit in (None, placed.unit)
            and self.recompute in (None, placed.recompute)
            and self.sequence_parallel in (None, placed.sequence_parallel)
        )


class Pins(Schema):
    """Of a plan: its schedule, its micro-batch size, and by name of a module what is pinned there."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, ModulePin] = Field(init=False)
    schedule: str | None = None
    micro_batch_size: Count | None = None

    @property
    def modules(self) -> dict[str, ModulePin]:
        return cast(dict[str, ModulePin], self.__pydantic_extra__ or {})

    def of(self, module: str) -> ModulePin:
        return self.modules.get(module, _FREE)

    def allows(self, plan: Plan) -> bool:
        return (
            self.schedule in (None, plan.schedule.name)
            and self.micro_batch_size in (None, plan.micro_batch_size)
            and all(self.of(name).allows(placed) for name, placed in plan.modules.items())
        )


class Exclusions(Schema):
    schedule: frozenset[str] = frozenset()
    recompute: frozenset[Recompute] = frozenset()

    def allows(self, plan: Plan, trained: Container[str]) -> bool:
        """`trained`: names of the modules that have a backward; the others have nothing to recompute."""
        return plan.schedule.name not in self.schedule and not any(
            placed.recompute in self.recompute for name, placed in plan.modules.items() if name in trained
        )


_FREE = ModulePin()


def require_known(pin: Pins, exclude: Exclusions, workload: Workload) -> None:
    """ConfigError for a module or a schedule that there is none of, and where nothing is left."""
    names = [module.name for module in workload.modules]
    for module in pin.modules:
        if module not in names:
            raise ConfigError(f"search.pin.{module}", got=module, expected=f"one of {names}", fix="name a module")
    schedules = {
        "search.pin.schedule": [pin.schedule] if pin.schedule else [],
        "search.exclude.schedule": exclude.schedule,
    }
    for where, found in schedules.items():
        if unknown := sorted({*found} - {*SCHEDULES}):
            raise ConfigError(where, got=unknown[0], expected=f"one of {sorted(SCHEDULES)}", fix="name a schedule")
    if exclude.recompute == {*Recompute}:
        raise ConfigError(
            "search.exclude.recompute",
            got="all of them",
            expected=f"fewer than {sorted(Recompute)}",
            fix="leave one out: none is to recompute nothing",
        )
