"""What a step's lanes cost, before anything is put in order: enough for lower bounds, and cheap.

StepWork --CostSource--> StepPrice: a StageCost by lane; gradients, optimizer and agreement by class of alike ranks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_mosaic.cost_model.clock.machine import Beside, Machine
from megatron_mosaic.cost_model.effects.boundary_traffic import Message, boundary_message, stage_message
from megatron_mosaic.cost_model.effects.gradients import gradient_sync_s
from megatron_mosaic.cost_model.effects.interference import CoRunner
from megatron_mosaic.cost_model.effects.memory import LaneMemory, footprint_bytes, stage_memory
from megatron_mosaic.cost_model.effects.parameters import updated_parameters
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.source import CostSource
from megatron_mosaic.cost_model.work import Lane, StageWork, StepWork, of_kind
from megatron_mosaic.plan.training import Sharding
from megatron_mosaic.schedules.actions import Kind

_INSIDE, _ACROSS = Group.on_one_node(2), Group(2, 2, 1)  # two ranks of one node, of two
_LEAST_S = 1e-12  # of an action that does nothing
_NEVER_HIDDEN_FRAC = 0.1  # of the gradients' traffic: the last bucket has no backward left beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Seconds of one lane's actions by kind and of its tail, and what each of its ranks holds."""

    action_s: Mapping[Kind, float]  # of one action: a unit on one virtual stage, its share of the stage's layers
    num_actions: int  # of each kind
    threads: int  # at work on all ranks of the stage together
    gradients_s: float
    updated_parameters: float  # that a rank's optimizer step goes over
    memory: LaneMemory

    def seconds(self, kind: Kind) -> float:
        """Of one action. ScheduleError for a kind that has no price."""
        return of_kind(self.action_s, kind)

    @property
    def busy_s(self) -> float:
        """Of all actions."""
        return self.num_actions * sum(self.action_s.values())


def price_stage(work: StageWork, source: CostSource) -> StageCost:
    """Everything that depends on this stage alone. ProfileError where a measurement is missing."""
    busy_s = {kind: source.action_cost(work, kind).busy_s for kind in work.kinds}
    return StageCost(
        action_s={kind: busy_s.get(kind, 0.0) / work.layout.vpp for kind in (Kind.F, Kind.B)},
        num_actions=work.num_actions,
        threads=source.threads(work) * work.num_ranks,
        gradients_s=gradient_sync_s(work, source.comm, source.precision, source.setup),
        updated_parameters=updated_parameters(work, source.setup),
        memory=stage_memory(work, source.precision, source.setup),
    )


@dataclass(frozen=True, kw_only=True)
class StepPrice:
    """Costs by lane and by class of ranks (ranks with the same lanes), and bounds that need no clock."""

    work: StepWork
    source: CostSource
    costs: tuple[StageCost, ...]  # by lane

    @cached_property
    def machine(self) -> Machine:
        """As whole lanes see it."""
        return self.source.machine([cost.threads for cost in self.costs])

    def machine_of(self, lane_of: Sequence[int], share: Sequence[float]) -> Machine:
        """As slot classes see it: class i is so much of the slots of lane `lane_of[i]`."""
        return self.source.machine([round(self.costs[lane].threads * part) for lane, part in zip(lane_of, share)])

    def beside(self, alone: Machine, devices: tuple[tuple[int, ...], ...], jobs: Sequence[tuple[int, Kind]]) -> Beside:
        """The machine where tracks slow each other down on these devices; `jobs`: (lane, kind), in virtual stages."""
        made = {job: self.runner(*job) for job in dict.fromkeys(jobs)}  # a drawn step has a job for every action
        runners = tuple([made[job] for job in jobs])
        return Beside(alone=alone, devices=devices, runners=runners, interference=self.source.interference)

    def runner(self, lane: int, kind: Kind) -> CoRunner:
        """A lane's action beside others, through all virtual stages: they divide seconds and bytes alike."""
        source, work = self.source, self.work.lanes[lane].work
        return CoRunner(
            alone_s=max(source.action_cost(work, kind).busy_s, _LEAST_S),
            moved_bytes=source.moved_bytes(work, kind),
            footprint_bytes=footprint_bytes(stage_memory(work, source.precision, source.setup)),
            host_s=source.host_s(work, kind),
        )

    def transfer_s(self, since: int, to: int) -> float:
        """Seconds from the end of an action of one lane to the start of the one on another that needs its result."""
        source, target = self.work.lanes[since], self.work.lanes[to]
        message, size, comm = self._message(source, target), self.source.precision.value_bytes, self.source.comm
        return max(
            comm.estimate(Operation.p2p, _INSIDE, message.intra_values * size),
            comm.estimate(Operation.p2p, _ACROSS, message.inter_values * size),
        )

    def _message(self, source: Lane, target: Lane) -> Message:
        if source.module == target.module:
            return stage_message(source, target, self.work.gpus_per_node, self.source.setup.scatters_messages)
        edge = next((e for e in self.work.edges if (e.source, e.target) == (source.module, target.module)), None)
        if edge is None:  # a gradient, on its way back
            return self._message(target, source)
        return boundary_message(edge, source, target, self.work.gpus_per_node)

    @cached_property
    def gradients_s(self) -> tuple[float, ...]:
        """Per class: the collectives of its modules' gradients, one after the other, as far as nothing hides them."""
        return tuple(
            exposed_gradients_s([self.costs[i] for i in lanes], self.source) for lanes in self.work.class_lanes
        )

    @cached_property
    def optimizer_s(self) -> tuple[float, ...]:
        """Per class. All ranks compute at once."""
        slow = self.machine.crowding(self.work.num_busy_ranks)
        return tuple(
            slow * self.source.optimizer_s(sum(self.costs[i].updated_parameters for i in lanes)) + self.consensus_s
            for lanes in self.work.class_lanes
        )

    @cached_property
    def data_s(self) -> float:
        """Before the first action every rank loads the global batch, all at once."""
        slow = self.machine.crowding(self.work.world.size)
        return slow * self.work.num_samples * self.source.overheads.sample_s

    @cached_property
    def loop_s(self) -> float:
        """What a rank with modules does behind its last action beyond summing gradients and updating parameters (norm,
        clipping, the loop), all at once."""
        return self.machine.crowding(self.work.num_busy_ranks) * self.source.overheads.step_s

    @cached_property
    def consensus_s(self) -> float:
        """A small all-reduce over the world: once for the token count, once for norm and skip decision."""
        return self.source.consensus_s(self.work.world)

    @cached_property
    def lower_bound_s(self) -> float:
        """No step is faster: the busiest rank's work on its fullest track, and the way to each lane's first action
        before its work."""
        busy_s = [cost.busy_s for cost in self.costs]
        bounds, tail_of = [self.machine.least_s(busy_s)], [0.0] * len(busy_s)
        for lanes, gradients_s in zip(self.work.class_lanes, self.gradients_s):
            bounds.append(self._busiest_track_s(lanes, busy_s) + gradients_s)
            for i in lanes:
                tail_of[i] = max(tail_of[i], gradients_s)
        before: list[float] = []  # by lane, the way to its first action
        for i, sources in enumerate(self.work.sources):
            before.append(max([before[s] + self.costs[s].seconds(Kind.F) for s in sources], default=0.0))
            bounds.append(before[i] + busy_s[i] + tail_of[i])
        tail_s = self.consensus_s + max(self.optimizer_s) + self.loop_s
        return self.data_s + max(bounds) + tail_s

    def _busiest_track_s(self, lanes: Sequence[int], busy_s: Sequence[float]) -> float:
        """Lanes of one rank take turns on a track; tracks run at the same time."""
        by_track = dict[int, float]()
        for i in lanes:
            track = self.work.graph.tracks.get(self.work.lanes[i].module, 0)
            by_track[track] = by_track.get(track, 0.0) + busy_s[i]
        return max(by_track.values())

    @cached_property
    def lower_bound_bytes(self) -> float:
        """No schedule needs less on the fullest rank: its parameters, and the units of its hungriest lane."""
        least = [live * cost.memory.unit_bytes for live, cost in zip(self.work.min_live_units, self.costs)]
        return max(
            sum(self.costs[i].memory.static_bytes for i in lanes)
            + max(least[i] for i in lanes)
            + max(self.costs[i].memory.workspace_bytes for i in lanes)
            for lanes in self.work.class_lanes
        )


def exposed_gradients_s(costs: Sequence[StageCost], source: CostSource) -> float:
    """Of a rank with these lanes. Traffic hides behind the last backward of each; that of FSDP behind all work."""
    whole = source.setup.sharding is Sharding.parameters
    over_s = sum(cost.busy_s if whole else cost.seconds(Kind.B) for cost in costs)
    return exposed_s(sum(cost.gradients_s for cost in costs), over_s, source)


def exposed_s(gradients_s: float, over_s: float, source: CostSource) -> float:
    """Of so many seconds of gradients' traffic, those that this much work does not hide."""
    overlap_frac = source.setup.gradient_overlap_frac
    if not overlap_frac:
        return gradients_s
    return max(_NEVER_HIDDEN_FRAC * gradients_s, gradients_s - overlap_frac * over_s)
