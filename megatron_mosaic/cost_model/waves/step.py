"""A step of a plan in waves: forward wave by wave, backward the other way, then gradients by pool and the optimizer.

    start of a slice  = all its ranks are free, and all that feeds it has arrived
    end               = start + seconds of its layers

There is no barrier between waves: the order on each rank is the plan's. The backward starts where the forward of all
has ended: a contrastive loss needs the rows of all samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.cost_model.effects.gradients import gradient_sync_s
from megatron_mosaic.cost_model.effects.memory import Memory, add_up, stage_memory
from megatron_mosaic.cost_model.effects.parameters import updated_parameters
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import StageCost, exposed_s
from megatron_mosaic.cost_model.waves.activations import Activations, after_slice
from megatron_mosaic.cost_model.waves.slices import Pool, list_pools, list_uses, work_of
from megatron_mosaic.cost_model.waves.transfers import Feed, list_feeds, moved_values, transfer_s
from megatron_mosaic.plan import RankSet
from megatron_mosaic.plan.tasks.waves import Slice, WavePlan
from megatron_mosaic.schedules import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One action of a slice, and when."""

    each: Slice
    kind: Kind
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveStep:
    """What a step comes to. `exposed_transfer_s`: what it would be shorter if rows needed no time to move."""

    step_s: float
    forward_s: float
    backward_s: float
    exposed_transfer_s: float
    moved_bytes: float  # between ranks in the forward; the backward moves gradients of what has one
    gradients_s: float  # of the rank that needs longest, with its optimizer
    busy_s: float  # of all ranks together
    memory: Mapping[int, Memory]  # by rank
    spans: tuple[Span, ...]
    world_size: int

    @property
    def peak_bytes(self) -> float:
        return max(held.total for held in self.memory.values())

    @property
    def bubble_frac(self) -> float:
        return 1 - self.busy_s / (self.world_size * self.step_s)

    @property
    def transfer_frac(self) -> float:
        return self.exposed_transfer_s / self.step_s


class WaveClock:
    """Prices plans in waves of one cost model. Remembers what slices cost."""

    def __init__(self, model: CostModel) -> None:
        self.model, self.workload = model, model.workload
        self.uses = list_uses(model.workload)
        self._gpus_per_node = model.cluster.gpus_per_node

    def cost(self, each: Slice) -> StageCost:
        """Of a slice on its ranks."""
        return self.model.stage_cost(work_of(each, self.uses[each.task, each.module], self._gpus_per_node))

    def simulate(self, plan: WavePlan) -> WaveStep:
        """The step of a plan that `validate_waves` lets pass."""
        slices = list(plan.slices)
        costs = [self.cost(each) for each in slices]
        rows = self._rows(slices)
        feeds = [[(i, self._transfer_s(feed, each)) for i, feed in found] for each, found in zip(slices, rows)]
        moved = sum(moved_values(feed, each) for each, found in zip(slices, rows) for _, feed in found)
        forward, backward, spans = self._passes(slices, costs, feeds)
        free, free_back, _ = self._passes(slices, costs, [[(i, 0.0) for i, _ in each] for each in feeds])
        pools = list_pools(slices, self.workload, self._gpus_per_node)
        tail_s = self._tail_s(pools, slices, costs, plan.world_size)
        return WaveStep(
            step_s=forward + backward + tail_s,
            forward_s=forward,
            backward_s=backward,
            exposed_transfer_s=forward + backward - free - free_back,
            moved_bytes=moved * self.model.source.precision.value_bytes,
            gradients_s=tail_s,
            busy_s=sum(len(each.ranks) * cost.busy_s for each, cost in zip(slices, costs)),
            memory=self._memory(pools, slices, costs),
            spans=spans,
            world_size=plan.world_size,
        )

    def _rows(self, slices: Sequence[Slice]) -> list[list[tuple[int, Feed]]]:
        """By slice: numbers of those that feed it, and with how much."""
        last: dict[tuple[str, str], Slice] = {}
        number = {id(each): i for i, each in enumerate(slices)}
        found = []
        for each in slices:
            feeds = list_feeds(each, last, self.uses, self.workload)
            found.append([(number[id(feed.source)], feed) for feed in feeds])
            last[each.task, each.module] = each
        return found

    def _transfer_s(self, feed: Feed, target: Slice) -> float:
        source = self.model.source
        return transfer_s(feed, target, self._gpus_per_node, source.comm, source.precision.value_bytes)

    def _passes(
        self, slices: Sequence[Slice], costs: Sequence[StageCost], feeds: Sequence[Sequence[tuple[int, float]]]
    ) -> tuple[float, float, tuple[Span, ...]]:
        """Seconds of forward and backward, and when each slice works."""
        gradients: list[list[tuple[int, float]]] = [[] for _ in slices]
        for i, found in enumerate(feeds):
            for source, seconds in found:
                if costs[source].seconds(Kind.B):
                    gradients[source].append((i, seconds))
        numbers = range(len(slices))
        spans: list[Span] = []
        ends: list[float] = []
        for kind, order, needs in ((Kind.F, numbers, feeds), (Kind.B, numbers[::-1], gradients)):
            since = sum(ends)
            free: dict[int, float] = defaultdict(float)
            done = [0.0] * len(slices)
            for i in order:
                each, seconds = slices[i], costs[i].seconds(kind)
                if not seconds:
                    continue  # a frozen slice has no backward
                arrived = max((done[source] + way for source, way in needs[i]), default=0.0)
                start = max(arrived, max(free[rank] for rank in each.ranks))
                done[i] = start + seconds
                free.update(dict.fromkeys(each.ranks, done[i]))
                spans.append(Span(each=each, kind=kind, start_s=since + start, end_s=since + done[i]))
            ends.append(max(done, default=0.0))
        return ends[0], ends[1], tuple(spans)

    def _tail_s(
        self, pools: Sequence[Pool], slices: Sequence[Slice], costs: Sequence[StageCost], world_size: int
    ) -> float:
        """Gradients of a rank's pools one after the other, as far as its backwards do not hide them, and its optimizer;
        all ranks agree on the norm."""
        source = self.model.source
        backward_s, sync_s, updated = (defaultdict[int, float](float) for _ in range(3))
        for each, cost in zip(slices, costs):
            for rank in each.ranks:
                backward_s[rank] += cost.seconds(Kind.B)
        for pool in pools:
            seconds = gradient_sync_s(pool.work, source.comm, source.precision, source.setup)
            count = updated_parameters(pool.work, source.setup)
            for rank in pool.ranks:
                sync_s[rank] += seconds
                updated[rank] += count
        tails = [
            exposed_s(sync_s[rank], backward_s[rank], source) + source.optimizer_s(updated[rank]) for rank in backward_s
        ]
        return max(tails) + source.consensus_s(Group.of(RankSet.block(0, world_size), self._gpus_per_node))

    def _memory(self, pools: Sequence[Pool], slices: Sequence[Slice], costs: Sequence[StageCost]) -> dict[int, Memory]:
        """By rank: parameters, gradients and optimizer of its pools, and the fullest moment of its slices' activations
        (every forward comes before every backward)."""
        static: dict[int, list[Memory]] = defaultdict(list)
        for pool in pools:
            memory = stage_memory(pool.work, self.model.source.precision, self.model.source.setup).static
            for rank in pool.ranks:
                static[rank].append(memory)
        activations: dict[int, Activations] = {}
        for each, cost in zip(slices, costs):
            activations |= after_slice(each.ranks, cost, activations)
        return {rank: add_up([*parts, activations[rank].fullest]) for rank, parts in sorted(static.items())}
