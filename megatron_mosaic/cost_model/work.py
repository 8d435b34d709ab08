"""What each lane of a plan has to do in a step. Behind this file nothing takes a plan, only these values.

Plan, Workload --list_stage_work--> StepWork: lanes (name, ranks, StageWork), edges, classes of alike ranks

A `StageWork` says all that a cost depends on, and no rank: two lanes with equal work cost the same wherever they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache

from megatron_mosaic.cost_model.clock.replicas import LaneSlots, Link, Replicas, Units, find_replicas
from megatron_mosaic.cost_model.groups import Group, StageGroups, stage_groups
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.layers import count_layers
from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, Recompute, ScheduleChoice
from megatron_mosaic.plan.quota import shares_of_tracks
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Workload
from megatron_mosaic.schedules import Kind, stage_graph
from megatron_mosaic.schedules.passes import modules_by_track
from megatron_mosaic.schedules.rank_classes import RankClass, rank_classes
from megatron_mosaic.schedules.stage_graph import StageGraph

_FORWARD, _BOTH = (Kind.F,), (Kind.F, Kind.B)
_ALONE: FrozenMap[int, float] = FrozenMap()


def of_kind[T](table: Mapping[Kind, T], kind: Kind) -> T:
    """The entry of a kind of action. ScheduleError for those that have none."""
    if kind not in table:
        raise ScheduleError(
            f"cost of kind {kind}",
            got="a split backward",
            expected=f"one of {sorted(table)}: split backwards have no price yet",
            fix="use a schedule of whole backwards",
        )
    return table[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """The work of one pipeline stage in a step, on each of its ranks. The key of every cost."""

    module: ModuleConfig
    layout: Layout
    dense_layers: int  # of the stage, all its chunks together
    expert_layers: int  # and those whose MLP is a mixture of experts
    first: bool  # of the module's stages
    last: bool
    items: int  # that the busiest dp slot takes in one full unit, at the mean count
    num_units: int
    kinds: tuple[Kind, ...]  # of its actions
    reaches_layers: bool  # its backward: else it ends at the trained projector of a frozen module
    recompute: Recompute
    sequence_parallel: bool
    share: float  # of the rank's SMs or cores
    groups: StageGroups
    track: int = 0  # among those of its ranks
    track_shares: FrozenMap[int, float] = _ALONE  # of all tracks of its ranks, granted jointly; none: it takes turns
    _hash: int = field(init=False, repr=False, compare=False)  # worked out once: a search asks a hundred thousand times

    def __post_init__(self) -> None:
        compared = tuple([getattr(self, each.name) for each in fields(self) if each.compare])
        object.__setattr__(self, "_hash", hash(compared))

    def __hash__(self) -> int:
        return self._hash

    @property
    def layers(self) -> int:
        return self.dense_layers + self.expert_layers

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks // self.layout.pp

    @property
    def num_actions(self) -> int:
        """Of each kind: a unit on one virtual stage is one."""
        return self.num_units * self.layout.vpp

    @property
    def tokens(self) -> float:
        """Of a unit, on one rank of a cp group."""
        return self.items * self.module.tokens_per_item / self.layout.cp

    @property
    def hidden_split(self) -> int:
        """Ranks that share the hidden states between two layers."""
        return self.layout.cp * (self.layout.tp if self.sequence_parallel else 1)

    @property
    def layers_by_mlp(self) -> tuple[tuple[bool, int], ...]:
        """(whether the MLP is dense, so many layers)."""
        counts = (True, self.dense_layers), (False, self.expert_layers)
        return tuple((dense, count) for dense, count in counts if count)

    def parts(self, kind: Kind = Kind.F) -> dict[Part, int]:
        """How often an action of this kind goes through each part."""
        within = kind is Kind.F or self.reaches_layers
        return {Part.pre: int(self.first and within), Part.layer: self.layers * within, Part.post: int(self.last)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A pipeline stage of a module: where it runs, and what it does there."""

    module: str
    stage: int
    ranks: RankSet
    work: StageWork

    @property
    def name(self) -> str:
        return f"{self.module}.{self.stage}"


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of all lanes, and what they have in common."""

    lanes: tuple[Lane, ...]  # modules in topological order
    classes: tuple[RankClass, ...]
    edges: tuple[Edge, ...]
    graph: StageGraph
    schedule: ScheduleChoice
    world: Group
    num_samples: int
    gpus_per_node: int
    slots_apart: bool = False  # dp slots of a lane differ in their work, so that none stands for another

    @cached_property
    def class_lanes(self) -> tuple[tuple[int, ...], ...]:
        """By class, the numbers of its lanes."""
        number = {lane.name: i for i, lane in enumerate(self.lanes)}
        return tuple(tuple(sorted(number[name] for name in alike.lanes)) for alike in self.classes)

    @cached_property
    def replicas(self) -> Replicas:
        """Which dp slots of each lane do the same at the same time."""
        number = {lane.name: i for i, lane in enumerate(self.lanes)}
        stages = self.graph.num_stages
        links = [(i, i + 1) for i, lane in enumerate(self.lanes) if lane.stage < stages[lane.module] - 1]
        links += [(number[f"{m}.{stages[m] - 1}"], number[f"{m}.0"]) for m in self.graph.num_chunks]
        links += [(number[f"{a}.{stages[a] - 1}"], number[f"{b}.0"]) for a, b in self.graph.edges]
        return find_replicas(
            tuple(LaneSlots.of(lane.module, lane.ranks, lane.work.layout) for lane in self.lanes),
            tuple(links),
            tuple((alike.ranks, lanes) for alike, lanes in zip(self.classes, self.class_lanes)),
            tuple(self._parted(links)),
            apart=self.slots_apart,
        )

    def _parted(self, links: Iterable[Link]) -> Iterator[tuple[Link, Units]]:
        """Links, both ways, between a backbone without replicas and a module that has some and works on several of its
        microbatches at once: its slots have some of a unit's each. With the lane, and the lengths of its units."""
        graph = self.graph
        for link in links:
            modules = [self.lanes[each].module for each in link]
            if graph.backbone not in modules or modules[0] == modules[1]:
                continue
            other, backbone = sorted(link, key=lambda each: self.lanes[each].module == graph.backbone)
            size = graph.units[self.lanes[other].module]
            if self.lanes[backbone].work.layout.dp == 1 < min(size, self.lanes[other].work.layout.dp):
                lengths = {min(size, graph.num_microbatches), graph.num_microbatches % size or size}
                for way in (link, link[::-1]):
                    yield way, (other, tuple(sorted(lengths)))

    @property
    def num_busy_ranks(self) -> int:
        return sum(len(alike.ranks) for alike in self.classes)

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """By lane, the lanes whose forwards its own need: earlier ones."""
        last = {lane.module: i for i, lane in enumerate(self.lanes)}
        feeds = {name: [last[a] for a, b in self.graph.edges if b == name] for name in last}
        return tuple((i - 1,) if lane.stage else tuple(feeds[lane.module]) for i, lane in enumerate(self.lanes))

    @property
    def min_live_units(self) -> tuple[int, ...]:
        """By lane, units that are alive at some moment at least. 1F1B warms up with a unit for each stage behind it;
        other schedules may keep fewer."""
        if self.schedule.name != "1f1b":
            return (1,) * len(self.lanes)
        behind = [self.graph.stages_after(lane.module, lane.stage) for lane in self.lanes]
        return tuple(min(lane.work.num_units, far + 1) for lane, far in zip(self.lanes, behind))


def list_stage_work(plan: Plan, workload: Workload, gpus_per_node: int) -> StepWork:
    """The work of a training step of the plan, on nodes of so many ranks."""
    graph = stage_graph(plan, workload)
    samples = plan.micro_batch_size * plan.modules[workload.backbone.name].layout.dp
    classes = rank_classes(plan)
    beside = _shares_beside(plan, graph, classes) if graph.tracks else {}
    lanes: list[Lane] = []
    for module in workload.modules:
        placed, name = plan.modules[module.name], module.name
        lanes += list_lanes(
            module,
            placed,
            items=items_of_unit(module, samples * graph.units[name], placed.layout.dp),
            num_units=graph.num_units(name),
            kinds=_BOTH if name in graph.has_backward else _FORWARD,
            reaches_layers=workload.hidden_has_gradient(name),
            gpus_per_node=gpus_per_node,
            track=graph.tracks.get(name, 0),
            track_shares=beside.get(name, _ALONE),
        )
    return StepWork(
        lanes=tuple(lanes),
        classes=classes,
        edges=workload.edges,
        graph=graph,
        schedule=plan.schedule,
        world=_world(plan.world_size, gpus_per_node),
        num_samples=plan.global_batch_size,
        gpus_per_node=gpus_per_node,
    )


def items_of_unit(module: ModuleConfig, samples: int, dp: int) -> int:
    """That the busiest dp slot takes of so many samples: an item is not split."""
    return math.ceil(samples * module.items_per_sample / dp - 1e-9)


def _shares_beside(plan: Plan, graph: StageGraph, classes: Iterable[RankClass]) -> dict[str, FrozenMap[int, float]]:
    """Module -> shares of the tracks of its ranks; where these differ, of those that leave its own track least. A
    module without a quota has its track's, as it has in a run."""
    found: dict[str, FrozenMap[int, float]] = {}
    track_of = graph.lane_tracks
    for alike in classes:
        tracks = modules_by_track(track_of, alike.lanes)
        if len(tracks) == 1:
            continue
        shares = FrozenMap(shares_of_tracks({t: [plan.modules[m].quota.share for m in tracks[t]] for t in tracks}))
        for track, modules in tracks.items():
            for module in modules:
                if module not in found or shares[track] < found[module][track]:
                    found[module] = shares
    return found


@lru_cache(maxsize=65536)
def list_lanes(
    module: ModuleConfig,
    placed: ModulePlan,
    *,
    items: int,
    num_units: int,
    kinds: tuple[Kind, ...],
    reaches_layers: bool,
    gpus_per_node: int,
    track: int = 0,
    track_shares: FrozenMap[int, float] = _ALONE,
) -> tuple[Lane, ...]:
    """The lanes of one module: `items` that its busiest dp slot takes in a full unit, and so many units in a step."""
    lanes = []
    for stage in range(placed.layout.pp):
        ranks = placed.stage_ranks(stage)
        dense_layers, expert_layers = count_layers(module, placed.layout, stage)
        work = StageWork(
            module=module,
            layout=placed.layout,
            dense_layers=dense_layers,
            expert_layers=expert_layers,
            first=stage == 0,
            last=stage == placed.layout.pp - 1,
            items=items,
            num_units=num_units,
            kinds=kinds,
            reaches_layers=reaches_layers,
            recompute=placed.recompute,
            sequence_parallel=placed.sequence_parallel,
            share=placed.quota.share,
            groups=stage_groups(ranks, placed.layout, gpus_per_node),
            track=track,
            track_shares=track_shares,
        )
        lanes.append(Lane(module=module.name, stage=stage, ranks=ranks, work=work))
    return tuple(lanes)


@lru_cache(maxsize=64)
def _world(world_size: int, gpus_per_node: int) -> Group:
    return Group.of(RankSet.block(0, world_size), gpus_per_node)
