"""The plan that came nearest to fitting: its fullest ranks, and what each module holds there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Plan, RankSet
from megatron_mosaic.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """`ranks` do the same and are the fullest. Of `num_bytes` on each, `always_bytes` are there whatever is alive:
    parameters with their states, and buffers. `by_module`: the bytes of each module's lanes at the worst moment, the
    most first; the rest is workspace."""

    plan: Plan
    ranks: RankSet
    num_bytes: float
    always_bytes: float
    by_module: Mapping[str, float]

    @classmethod
    def of(cls, plan: Plan, simulation: Simulation) -> Miss:
        work, costs = simulation.price.work, simulation.price.costs
        peaks = simulation.class_peak_bytes
        fullest = max(range(len(peaks)), key=peaks.__getitem__)
        lanes = work.class_lanes[fullest]
        held = {work.lanes[i].module: 0.0 for i in lanes}
        for i in lanes:
            held[work.lanes[i].module] += costs[i].memory.static_bytes
        for track in simulation.program.live_units[fullest]:
            sizes = [costs[i].memory.unit_bytes for i in track.lanes]
            alive = [[n * size for n, size in zip(live, sizes)] for live in track.combinations]
            for i, size in zip(track.lanes, max(alive, key=sum)):
                held[work.lanes[i].module] += size
        return cls(
            plan=plan,
            ranks=work.classes[fullest].ranks,
            num_bytes=peaks[fullest],
            always_bytes=sum(costs[i].memory.static_bytes for i in lanes),
            by_module=FrozenMap(sorted(held.items(), key=lambda pair: -pair[1])),
        )

    def __str__(self) -> str:
        held = {**self.by_module, "workspace": self.num_bytes - sum(self.by_module.values())}
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.items())
        plural = "s" if len(self.ranks) > 1 else ""
        return f"at least {format_bytes(self.num_bytes)} on rank{plural} {self.ranks} ({parts}), with {self._layouts()}"

    def _layouts(self) -> str:
        placed = [f"{name} {each.layout} recompute {each.recompute.value}" for name, each in self.plan.modules.items()]
        return f"{', '.join(placed)}, micro-batch {self.plan.micro_batch_size}, {self.plan.schedule}"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ranks": str(self.ranks),
            "bytes": self.num_bytes,
            "always_bytes": self.always_bytes,
            "module": next(iter(self.by_module)),
            "by_module": dict(self.by_module),
        }
