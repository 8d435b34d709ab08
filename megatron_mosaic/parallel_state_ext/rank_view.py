"""What a plan means for one rank, worked out once: where it stands in each of its modules, and whom it talks to.

    Plan, rank --RankView.of--> RankView --> Grids, Scopes, Channels, PlanMap: none of them asks the layout again

Pure integers: any process may look at the plan as any rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.group_list import own_groups
from megatron_mosaic.plan import ModulePlan, Plan
from megatron_mosaic.plan.layout import Coordinates, coordinates_of, rank_at
from megatron_mosaic.plan.workload import Edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """The rank at the same place of the stage before or after. `wraps`: around the ring of virtual stages."""

    rank: int
    wraps: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleView:
    """One module that the rank runs.

    `expert_rank` the rank's number in its ep group
    `groups`      field of ProcessGroupCollection -> the ranks of its group, ascending
    `neighbours`  +1: on the stage after, -1: on the stage before; only virtual stages have one around the ring
    `imports`     ends at which rows arrive on this rank: on the first stage, those of all edges to the module
    `exports`     ends from which rows leave it: on the last stage, those of all edges from the module
    """

    name: str
    placed: ModulePlan
    at: Coordinates
    expert_rank: int
    groups: Mapping[str, tuple[int, ...]]
    neighbours: Mapping[int, Neighbour]
    imports: tuple[EdgeEnd, ...]
    exports: tuple[EdgeEnd, ...]

    @classmethod
    def of(cls, name: str, placed: ModulePlan, rank: int, edges: Sequence[Edge]) -> ModuleView:
        """The view of a rank that runs the module."""
        at, last = coordinates_of(placed, rank), placed.layout.pp - 1
        groups = own_groups(placed, rank)
        return cls(
            name=name,
            placed=placed,
            at=at,
            expert_rank=groups["ep"].index(rank),
            groups=groups,
            neighbours=dict(_neighbours(placed, at)),
            imports=tuple(EdgeEnd.target_of(edge) for edge in edges if edge.target == name and at.pp == 0),
            exports=tuple(EdgeEnd.source_of(edge) for edge in edges if edge.source == name and at.pp == last),
        )

    @property
    def chunks(self) -> range:
        """The virtual stages on this rank."""
        return range(self.placed.layout.vpp)

    def chunk_of_neighbour(self, chunk: int, step: int) -> int:
        """The virtual stage on the neighbour that comes after (+1) or before (-1) this one here."""
        return chunk + step * self.neighbours[step].wraps

    def is_first(self, chunk: int) -> bool:
        """Whether the virtual stage is the module's first, where rows arrive and no hidden states do."""
        return (self.at.pp, chunk) == (0, 0)

    def is_last(self, chunk: int) -> bool:
        """Whether the virtual stage is the module's last, from which rows leave."""
        return (self.at.pp, chunk) == (self.placed.layout.pp - 1, self.placed.layout.vpp - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """A plan as one rank sees it. `edges`: all that rows travel along; `modules`: those this rank runs, in order."""

    plan: Plan
    rank: int
    edges: tuple[Edge, ...]
    modules: Mapping[str, ModuleView]

    @classmethod
    def of(cls, plan: Plan, rank: int, edges: Sequence[Edge] = ()) -> RankView:
        """The view of this rank. An idle one has no modules."""
        modules = {name: ModuleView.of(name, plan.modules[name], rank, edges) for name in plan.modules_on(rank)}
        return cls(plan=plan, rank=rank, edges=tuple(edges), modules=modules)


def _neighbours(placed: ModulePlan, at: Coordinates) -> Iterator[tuple[int, Neighbour]]:
    for step in (+1, -1):
        around, stage = divmod(at.pp + step, placed.layout.pp)
        if not around or placed.layout.vpp > 1:
            rank = rank_at(placed, tp=at.tp, cp=at.cp, dp=at.dp, pp=stage)
            yield step, Neighbour(rank=rank, wraps=around != 0)
