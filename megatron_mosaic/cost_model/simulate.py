"""A plan's predicted step: StageCosts and a program through the clock.

After a rank's last action comes the tail: `~grads` (all-reduce), then, once all ranks have theirs (one gradient norm
over all modules), `~optimizer`. On this machine a step begins with `~data`: every rank loads the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.clock.program import Program, fold, planned_program
from megatron_mosaic.cost_model.clock.run import run_clock
from megatron_mosaic.cost_model.effects.memory import (
    LaneMemory,
    Memory,
    add_up,
    peak_bytes,
    precision_of,
    stage_memory,
    worst_moment,
)
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import StepPrice
from megatron_mosaic.cost_model.work import StepWork, list_stage_work
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Plan, RankSet
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Kind, Schedule
from megatron_mosaic.schedules.actions import FREES
from megatron_mosaic.schedules.timeline import Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """When each action of a program runs; the timeline is written out when asked for."""

    price: StepPrice
    program: Program
    start_s: tuple[float, ...]  # by row of the program
    end_s: tuple[float, ...]

    @property
    def class_end_s(self) -> tuple[float, ...]:
        """Per class, the end of the last action of its lanes, on all their slots: gradients are added over them."""
        lane_end_s = [max([self.end_s[row] for row in rows]) for rows in self.program.last]
        return tuple(max(self.price.data_s, *[lane_end_s[i] for i in lanes]) for lanes in self.price.work.class_lanes)

    @property
    def optimizer_start_s(self) -> float:
        """One token count and one gradient norm over all modules: everyone waits for the last gradient."""
        return max(map(sum, zip(self.class_end_s, self.price.gradients_s))) + self.price.consensus_s

    @property
    def step_s(self) -> float:
        return self.optimizer_start_s + max(self.price.optimizer_s) + self.price.loop_s

    @property
    def interference(self) -> str:
        """Where the constants come from by which tracks of one rank slow each other down; "" where none have tracks."""
        if not any(self.program.beside):
            return ""
        return "calibrated" if self.price.source.interference.is_measured else "not calibrated"

    @property
    def class_peak_bytes(self) -> tuple[float, ...]:
        """Per class. Tracks may meet their peaks at the same time: they add up."""
        memory = [cost.memory for cost in self.price.costs]
        return tuple(
            sum([peak_bytes(live.combinations, [memory[i] for i in live.lanes]) for live in tracks])
            for tracks in self.program.live_units
        )

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(self.class_peak_bytes)

    def memory(self) -> dict[RankSet, Memory]:
        """Ranks that do the same at the same time -> the peak of each, by what holds the bytes."""
        return memory_of_classes(self.price.work, self.program, [cost.memory for cost in self.price.costs])

    def timeline(self) -> Timeline:
        """Spans of a rank of each kind, which stands for all that do the same at the same time."""
        price, program, replicas = self.price, self.program, self.price.work.replicas
        order, lanes = program.schedule.order, price.work.lanes
        kinds_of: dict[int, list[int]] = {}  # slot class -> the ranks that stand for those that it runs on
        for kind in replicas.kinds:
            for each in kind.slot_classes:
                kinds_of.setdefault(each, []).append(kind.ranks.first)
        spans = [
            Span(rank, lanes[program.lane_of[slots]].name, start_s, end_s, str(order[at]))
            for at, slots, start_s, end_s in zip(program.entry, program.slots, self.start_s, self.end_s)
            for rank in kinds_of[slots]
        ]
        class_end_s, optimizer_start_s = self.class_end_s, self.optimizer_start_s
        for kind in replicas.kinds:
            rank, i = kind.ranks.first, kind.rank_class
            optimizer_end_s = optimizer_start_s + price.optimizer_s[i] + price.loop_s
            if price.data_s:
                spans.append(Span(rank, "~data", 0.0, price.data_s, "~data"))
            spans.append(Span(rank, "~grads", class_end_s[i], class_end_s[i] + price.gradients_s[i], "~grads"))
            spans.append(Span(rank, "~optimizer", optimizer_start_s, optimizer_end_s, "~optimizer"))
        return Timeline(tuple(sorted(spans)), FrozenMap({kind.ranks.first: kind.ranks for kind in replicas.kinds}))


def count_memory(simulation: Simulation) -> dict[int, list[tuple[float, dict[str, float]]]]:
    """The first rank of each kind -> seconds, and from then on the bytes that its lanes hold: parameters and their
    states, a workspace, and activations by lane. A forward's are there from its start."""
    price, program = simulation.price, simulation.program
    found: dict[int, list[tuple[float, dict[str, float]]]] = {}
    for kind in price.work.replicas.kinds:
        lanes = {program.lane_of[each] for each in kind.slot_classes}
        memory = {price.work.lanes[i].name: price.costs[i].memory for i in sorted(lanes)}
        static = sum(lane.static_bytes for lane in memory.values())
        changes = sorted(_changes(simulation, {*kind.slot_classes}))
        tracks = program.live_units[kind.rank_class]
        workspaces = [max(price.costs[i].memory.workspace_bytes for i in live.lanes) for live in tracks]
        held = {"static": static, "workspace": sum(workspaces)}
        held |= dict.fromkeys(memory, 0.0)
        samples = [(0.0, dict(held))]
        for at_s, units, name in changes:
            held[name] += units * memory[name].unit_bytes
            samples.append((at_s, dict(held)))
        found[kind.ranks.first] = samples
    return found


def _changes(simulation: Simulation, slot_classes: set[int]) -> Iterator[tuple[float, int, str]]:
    """When a unit of a lane begins to live (1) and ends (-1); at the same moment, ends first."""
    program, order = simulation.program, simulation.program.schedule.order
    trained = {lane for lane, kind in program.jobs if kind is not Kind.F}
    for at, slots, start_s, end_s in zip(program.entry, program.slots, simulation.start_s, simulation.end_s):
        if slots in slot_classes:
            action = order[at]
            if action.kind is Kind.F:
                yield start_s, 1, action.lane
            if action.kind in FREES or (action.kind is Kind.F and program.lane_of[slots] not in trained):
                yield end_s, -1, action.lane


def simulate(plan: Plan, model: CostModel, schedule: Schedule | None = None) -> Simulation:
    """The predicted step of a plan, in the order of this schedule (default: the plan's own)."""
    price = model.price(plan)
    if schedule is None:
        return simulate_planned(price)
    return simulate_program(price, fold(schedule, price.work.graph, price.work.replicas.classes))


def simulate_planned(price: StepPrice, num_microbatches: int = 0) -> Simulation:
    """In the order of the plan's schedule; `num_microbatches` of a shorter or longer step, 0: the plan's own."""
    graph = price.work.graph
    if num_microbatches:
        graph = replace(graph, num_microbatches=num_microbatches)
    return simulate_program(price, planned_program(price.work.schedule, graph, price.work.replicas.classes))


def simulate_program(price: StepPrice, program: Program) -> Simulation:
    """The step of a program whose costs are known. ScheduleError for a kind of action that has no price."""
    return simulate_jobs(price, program, [price.costs[lane].seconds(kind) for lane, kind in program.jobs])


def simulate_jobs(price: StepPrice, program: Program, job_s: Sequence[float]) -> Simulation:
    """The step of a program whose jobs take so long."""
    lag_s = [0.0] + [price.transfer_s(since, to) for since, to in program.links[1:]]
    machine = price.machine_of(program.lane_of, price.work.replicas.share)
    if any(program.beside):
        machine = price.beside(machine, program.beside, program.jobs)
    start_s, end_s = ([price.data_s + at for at in times] for times in run_clock(program, job_s, lag_s, machine))
    return Simulation(price=price, program=program, start_s=tuple(start_s), end_s=tuple(end_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """A simulation that is long enough to have met every rank's peak, and the seconds of what it leaves out."""

    simulation: Simulation
    added_s: float = 0.0  # 0: it is the whole step

    @property
    def step_s(self) -> float:
        return self.simulation.step_s + self.added_s


def estimate_step(price: StepPrice) -> StepEstimate:
    """The step from two short simulations: after the pipeline has filled, every period of microbatches adds the same.

    A period: whole units of every module, and as many microbatches as an interleaved pipeline takes in turns. Exact up
    to the irregularities of the merged order; for ranking plans, the simulator has the last word.
    """
    graph = price.work.graph
    depth = max(graph.stages_after(module, 0) for module in graph.num_stages) + 1
    period = math.lcm(*graph.units.values(), *(graph.num_stages[module] for module in graph.num_chunks))
    short = depth + 4 + (graph.num_microbatches - depth - 4) % period
    long = short + -(-8 // period) * period
    if graph.num_microbatches <= 2 * long:
        return StepEstimate(simulation=simulate_planned(price))
    before, simulation = (simulate_planned(price, count) for count in (short, long))
    added_s = (graph.num_microbatches - long) * (simulation.step_s - before.step_s) / (long - short)
    return StepEstimate(simulation=simulation, added_s=added_s)


def memory_of_classes(work: StepWork, program: Program, memory: list[LaneMemory]) -> dict[RankSet, Memory]:
    """Ranks that are alike -> the peak of each; `memory` by lane."""
    return {
        alike.ranks: add_up(worst_moment(live.combinations, [memory[i] for i in live.lanes]) for live in tracks)
        for alike, tracks in zip(work.classes, program.live_units)
    }


def estimate_memory(plan: Plan, workload: Workload, setup: TrainingSetup) -> dict[RankSet, Memory]:
    """Ranks that are alike -> the peak of each. No clock: the order of work decides what is alive."""
    work, precision = list_stage_work(plan, workload, plan.world_size), precision_of(setup)
    memory = [stage_memory(lane.work, precision, setup) for lane in work.lanes]
    return memory_of_classes(work, planned_program(work.schedule, work.graph, work.replicas.classes), memory)
