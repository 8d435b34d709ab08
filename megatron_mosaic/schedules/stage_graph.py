"""The module DAG as pipeline stages: what a schedule builder needs to know of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules.rank_classes import classes_of_lanes, rank_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraph:
    """Stages per module (and virtual stages on each), edges, microbatches of a step, which modules run backward, which
    lanes share ranks, and which modules run beside the others on theirs. Plans that differ only in the number of ranks
    have one graph: it is what schedules are kept by."""

    num_stages: Mapping[str, int]
    edges: tuple[tuple[str, str], ...]
    units: Mapping[str, int]
    num_microbatches: int
    has_backward: frozenset[str]
    backbone: str = ""  # its microbatches are what units count; builders that nest others around it need it
    num_chunks: Mapping[str, int] = FrozenMap()
    occupies: Mapping[str, frozenset[int]] = FrozenMap()
    tracks: Mapping[str, int] = FrozenMap()  # module -> track; those that are left out are on track 0

    def __post_init__(self) -> None:
        for name in ("num_stages", "units", "num_chunks", "tracks"):
            object.__setattr__(self, name, FrozenMap(getattr(self, name)))
        own = {lane: frozenset({-1 - number}) for number, lane in enumerate(self.lanes)}
        object.__setattr__(self, "occupies", FrozenMap(own | dict(self.occupies)))

    @classmethod
    def of(cls, plan: Plan, workload: Workload, num_microbatches: int) -> StageGraph:
        """Modules in the workload's order. Only edges between modules of the plan count."""
        placed = {module.name: plan.modules[module.name] for module in workload.modules if module.name in plan.modules}
        return cls(
            num_stages={name: module.layout.pp for name, module in placed.items()},
            edges=tuple((a, b) for a, b in workload.edge_pairs if a in placed and b in placed),
            units={name: plan.units(workload.backbone.name)[name] for name in placed},
            num_microbatches=num_microbatches,
            has_backward=workload.has_backward,
            backbone=workload.backbone.name,
            num_chunks={name: module.layout.vpp for name, module in placed.items() if module.layout.vpp > 1},
            occupies=classes_of_lanes(rank_classes(plan)),
            tracks=plan.tracks(workload.backbone.name),
        )

    @property
    def lanes(self) -> tuple[str, ...]:
        return tuple(f"{module}.{stage}" for module, count in self.num_stages.items() for stage in range(count))

    def chunks(self, module: str) -> int:
        return self.num_chunks.get(module, 1)

    def num_units(self, module: str) -> int:
        return -(-self.num_microbatches // self.units[module])

    def consumers(self, module: str) -> tuple[str, ...]:
        return tuple(target for source, target in self.edges if source == module)

    def reaches(self, module: str, other: str) -> bool:
        """Whether anything of the module flows into the other."""
        return any(target == other or self.reaches(target, other) for target in self.consumers(module))

    @property
    def lane_tracks(self) -> Mapping[str, int]:
        """Lane -> track, for those off track 0."""
        return {f"{m}.{stage}": track for m, track in self.tracks.items() for stage in range(self.num_stages[m])}

    def takes_turns(self, module: str, other: str) -> bool:
        """Whether they share ranks and a track there."""
        ours, theirs = (
            frozenset[int]().union(*[self.occupies[f"{m}.{stage}"] for stage in range(self.num_stages[m])])
            for m in (module, other)
        )
        return self.tracks.get(module, 0) == self.tracks.get(other, 0) and not ours.isdisjoint(theirs)

    def microbatches_of(self, module: str, unit: int) -> range:
        """The backbone microbatches that a unit covers."""
        size = self.units[module]
        return range(unit * size, min((unit + 1) * size, self.num_microbatches))

    def units_covering(self, module: str, microbatches: range) -> range:
        """The module's units that hold any of these microbatches."""
        size = self.units[module]
        return range(microbatches[0] // size, microbatches[-1] // size + 1)

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
