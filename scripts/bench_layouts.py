"""The borders that bench_boundary.py measures: layouts of both sides, what microbatches bring, the least bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, integers
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, RouteCache, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

WIDTH, WORLD_SIZE = 1024, 8
ROW_BYTES = 4 * WIDTH
SOURCE, TARGET = "encoder", "llm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """One hand-over of a global batch: each sample has one item in the encoder, all of whose rows the llm reads."""

    name: str
    source: ModulePlan
    target: ModulePlan
    samples: int = 8
    uneven: bool = False

    @property
    def edge(self) -> Edge:
        return Edge(source=SOURCE, target=TARGET, rows_per_item=1024, width=WIDTH)

    @property
    def colocated(self) -> bool:
        return bool(set(self.source.ranks.ranks) & set(self.target.ranks.ranks))

    def tokens(self) -> np.ndarray:
        """Tokens of each sample's item: a ViT's 577, or anything from 257 to 1024."""
        if not self.uneven:
            return np.full(self.samples, 577)
        return np.random.default_rng(0).integers(257, 1025, self.samples)

    def holders(self, end: EdgeEnd) -> tuple[int, ...]:
        """The ranks that hold rows at one end of the border."""
        placed = self.source if end.is_source else self.target
        return placed.stage_ranks(placed.layout.pp - 1 if end.is_source else 0).ranks

    def plan_map(self, rank: int, cache: RouteCache | None = None) -> PlanMap:
        return PlanMap(RankView.of(self.plan, rank, self.workload.edges), self.workload, cache)

    def metadata(self) -> Metadata:
        tokens, samples = self.tokens(), np.arange(self.samples)
        items = {SOURCE: Items(samples, tokens), TARGET: Items(samples, tokens)}
        start = np.zeros(self.samples, dtype=np.int64)
        links = Links(samples, start, samples, start, integers(tokens))
        return Metadata(items=items, links={(SOURCE, TARGET): links})

    def least_bytes(self, *, forward: bool) -> int:
        """Each row that a rank needs and does not hold itself, once."""
        total = 0
        for rank in range(WORLD_SIZE):
            ends = EdgeEnd.source_of(self.edge), EdgeEnd.target_of(self.edge)
            source, target = (self._held(rank, end) for end in ends)
            total += len(target - source if forward else source - target)
        return total * ROW_BYTES

    def _held(self, rank: int, end: EdgeEnd) -> set[tuple[int, int]]:
        """(item, token) of the rows that the rank holds at one end of the border."""
        if rank not in self.holders(end):
            return set()
        step_map = StepMap(self.plan_map(rank), [self.metadata()])
        shard, rows = step_map.shard(end.module, 0), step_map.rows(end, 0)
        items = np.array(shard.items, dtype=np.int64)[rows.items]
        return set(zip(items.tolist(), shard.tokens[rows.tokens].tolist(), strict=True))

    @property
    def workload(self) -> Workload:
        modules = (_module(SOURCE, Role.encoder), _module(TARGET, Role.backbone))
        return Workload(name="border", modules=modules, edges=(self.edge,))

    @property
    def plan(self) -> Plan:
        return Plan(
            workload="border",
            world_size=WORLD_SIZE,
            global_batch_size=self.samples,
            micro_batch_size=self.samples // self.target.layout.dp,
            schedule=ScheduleChoice("1f1b"),
            modules={SOURCE: self.source, TARGET: self.target},
        )


def _module(name: str, role: Role) -> ModuleConfig:
    backbone = role is Role.backbone
    return ModuleConfig(
        name=name,
        role=role,
        num_layers=4,
        hidden_size=WIDTH,
        num_heads=16,
        ffn_hidden_size=4 * WIDTH,
        tokens_per_item=1024,
        vocab_size=32 if backbone else 0,
        input_size=0 if backbone else 4,
        output_size=0 if backbone else WIDTH,
        causal=backbone,
    )


def _border(text: str, samples: int = 8, *, uneven: bool = False) -> Border:
    """`tp2 dp2 @0-3 -> tp4 @4-7`."""
    sides = []
    for side in text.split(" -> "):
        layout, ranks = side.split(" @")
        degrees = {degree[:2]: int(degree[2:]) for degree in layout.split()}
        sides.append(ModulePlan(ranks=RankSet.parse(ranks), layout=Layout(**degrees)))
    name = f"{text}, uneven tokens" if uneven else text
    return Border(name=name, source=sides[0], target=sides[1], samples=samples, uneven=uneven)


BORDERS = (
    _border("tp4 @0-3 -> dp4 @0-3"),
    _border("dp4 @0-3 -> tp4 @0-3"),
    _border("tp2 dp2 @0-3 -> tp4 @0-3"),
    _border("tp2 dp2 @0-3 -> dp4 @0-3"),
    _border("dp4 @0-3 -> dp4 @0-3"),
    _border("tp2 dp2 @0-3 -> tp2 dp2 @4-7"),
    _border("tp4 @0-3 -> dp4 @4-7"),
    _border("dp4 @0-3 -> tp4 @4-7"),
    _border("dp4 @0-3 -> tp2 dp2 @4-7"),
    _border("dp6 @0-5 -> tp2 dp3 @2-7", samples=12),
    _border("dp4 @0-3 -> tp2 dp4 @0-7"),
    _border("dp3 @0-2 -> dp2 @3-4", samples=12),
    _border("dp3 @0-2 -> dp2 @0-1", samples=12),
    _border("tp2 dp3 @0-5 -> tp3 dp2 @0-5", samples=12),
    _border("dp4 @0-3 -> cp2 dp2 @0-3"),
    _border("dp4 @0-3 -> cp2 dp2 @4-7"),
    _border("tp4 @0-3 -> pp2 dp2 @0-3"),
    _border("tp4 @0-3 -> dp4 @0-3", uneven=True),
    _border("dp4 @0-3 -> tp2 dp2 @4-7", uneven=True),
)
