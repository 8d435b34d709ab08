"""Schedule x CostModel -> Timeline.

Every rank runs its program in order (`schedules.program`, the same the executor follows). An action occupies all
ranks of its stage; it starts when they are free and its inputs have arrived:

    start = max(ranks free, end of each need + transfer)          end = start + busy

Where ranks share cores (this machine), actions that run at the same time slow each other down by processor sharing:
with t threads at work on c cores each action runs at rate min(1, c / t). After a rank's last action comes the tail:
`~grads` (all-reduce), then, once all ranks have theirs (one gradient norm over all modules), `~optimizer`. On this
machine a step begins with `~data`: every rank loads the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.effects.memory import Memory, memory_of_classes, peak_of_classes
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import PlanPrice, price_plan
from megatron_mosaic.cost_model.program import Program, build_program, planned_program
from megatron_mosaic.plan import Plan, RankSet
from megatron_mosaic.schedules import Schedule
from megatron_mosaic.schedules.timeline import Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedProgram:
    """A program with every number that the clock needs, by position: classes and lanes are counted from 0."""

    price: PlanPrice
    program: Program
    transfers: Mapping[tuple[int, int], float]  # (lane that needs, lane that is needed) -> seconds
    gradients_s: tuple[float, ...]  # per class
    optimizer_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]


def prepare_program(price: PlanPrice, num_microbatches: int = 0) -> PricedProgram:
    """The plan's program, with the costs of its lanes and the transfers between them.

    `num_microbatches` 0: the plan's own; any other number gives the program of a shorter or longer step.
    """
    lane_map = price.lane_map
    if num_microbatches:
        lane_map = replace(lane_map, graph=replace(lane_map.graph, num_microbatches=num_microbatches))
    return price_program(price, planned_program(price.plan.schedule, lane_map))


def price_program(price: PlanPrice, program: Program) -> PricedProgram:
    """A program of the plan's lanes, with their costs."""
    costs = price.costs
    return PricedProgram(
        price=price,
        program=program,
        transfers={
            (to, since): price.model.transfer_s(price.plan, program.lanes[since], program.lanes[to])
            for to, since in program.links
        },
        gradients_s=tuple(price.gradients_s.values()),
        optimizer_s=tuple(price.optimizer_s.values()),
        peak_bytes=peak_of_classes(program, price.lane_map, [cost.memory for cost in costs]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """When each action of a program runs; the timeline of all ranks is written out when asked for."""

    priced: PricedProgram
    start_s: tuple[float, ...]  # by position in the program
    end_s: tuple[float, ...]

    @property
    def class_end_s(self) -> tuple[float, ...]:
        """Per class, the end of its last action."""
        last = [self.priced.price.data_s] * len(self.priced.gradients_s)
        for lane, end_s in zip(self.priced.program.lane_of, self.end_s):
            for name in self.priced.program.classes[lane]:
                last[name] = max(last[name], end_s)
        return tuple(last)

    @property
    def optimizer_start_s(self) -> float:
        """One token count and one gradient norm over all modules: everyone waits for the last gradient."""
        return max(map(sum, zip(self.class_end_s, self.priced.gradients_s))) + self.priced.price.consensus_s

    @property
    def step_s(self) -> float:
        return self.optimizer_start_s + max(self.priced.optimizer_s) + self.priced.price.step_overhead_s

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(self.priced.peak_bytes)

    def memory(self) -> tuple[Memory, ...]:
        """Per class, its peak by what holds the bytes."""
        price = self.priced.price
        return memory_of_classes(self.priced.program, price.lane_map, [cost.memory for cost in price.costs])

    def ranks_alike(self) -> dict[int, RankSet]:
        """Lowest rank of each class -> the class: ranks that do the same at the same time."""
        members: dict[int, list[int]] = {}
        for rank, name in self.priced.price.lane_map.class_of_rank(self.priced.price.plan).items():
            members.setdefault(name, []).append(rank)
        return {ranks[0]: RankSet.of(ranks) for ranks in members.values()}

    def timeline(self) -> Timeline:
        """Spans of every rank."""
        program = self.priced.program
        spans = [
            Span(rank, f"{action.module}.{action.stage}", self.start_s[position], self.end_s[position], str(action))
            for position, action in enumerate(program.actions)
            for rank in self.priced.price.costs[program.lane_of[position]].ranks
        ]
        ends, optimizer_start_s = self.class_end_s, self.optimizer_start_s
        for rank, name in self.priced.price.lane_map.class_of_rank(self.priced.price.plan).items():
            if self.priced.price.data_s:
                spans.append(Span(rank, "~data", 0.0, self.priced.price.data_s, "~data"))
            grads_end_s = ends[name] + self.priced.gradients_s[name]
            spans.append(Span(rank, "~grads", ends[name], grads_end_s, "~grads"))
            optimizer_end_s = optimizer_start_s + self.priced.optimizer_s[name] + self.priced.price.step_overhead_s
            spans.append(Span(rank, "~optimizer", optimizer_start_s, optimizer_end_s, "~optimizer"))
        return Timeline(tuple(sorted(spans)))


def simulate(plan: Plan, model: CostModel, schedule: Schedule | None = None) -> Simulation:
    """The predicted step of a plan, in the order of this schedule (default: the plan's own)."""
    price = price_plan(plan, model)
    if schedule is None:
        return simulate_program(prepare_program(price))
    return simulate_program(price_program(price, build_program(schedule, price.lane_map)))


def simulate_program(priced: PricedProgram) -> Simulation:
    """The predicted step of a plan whose costs are known already."""
    run = _shared if priced.price.shared_cores else _alone
    data_s = priced.price.data_s
    start_s, end_s = ([data_s + at for at in times] for times in run(priced))
    return Simulation(priced=priced, start_s=tuple(start_s), end_s=tuple(end_s))


def estimate_step_s(price: PlanPrice) -> float:
    """The step from two short simulations: after the pipeline has filled, every microbatch adds the same.

    Exact up to the irregularities of the merged order; for ranking plans, the simulator has the last word.
    """
    graph = price.lane_map.graph
    depth = max(graph.stages_after(module, 0) for module in graph.num_stages) + 1
    short, long = depth + 4, depth + 12
    if graph.num_microbatches <= 2 * long:
        return simulate_program(prepare_program(price)).step_s
    short_s, long_s = (simulate_program(prepare_program(price, count)).step_s for count in (short, long))
    return long_s + (graph.num_microbatches - long) * (long_s - short_s) / (long - short)


def _alone(priced: PricedProgram) -> tuple[Sequence[float], Sequence[float]]:
    """Every rank owns its device: one pass in the global order."""
    program = priced.program
    free = [0.0] * len(priced.gradients_s)
    starts: list[float] = []
    ends: list[float] = []
    busy = [(cost.forward_s, cost.backward_s) for cost in priced.price.costs]
    for lane, backward, needs in zip(program.lane_of, program.backward, program.needs):
        classes = program.classes[lane]
        start = max([free[name] for name in classes])
        for need in needs:
            other = program.lane_of[need]
            arrival = ends[need] if other == lane else ends[need] + priced.transfers[lane, other]
            if arrival > start:
                start = arrival
        end = start + busy[lane][backward]
        for name in classes:
            free[name] = end
        starts.append(start)
        ends.append(end)
    return starts, ends


def _shared(priced: PricedProgram) -> tuple[Sequence[float], Sequence[float]]:
    """Ranks share cores: a fluid simulation from event to event."""
    program, costs = priced.program, priced.price.costs
    queues: list[list[int]] = [[] for _ in priced.gradients_s]  # per class, positions still to run, next one last
    for position in reversed(range(len(program.actions))):
        for name in program.classes[program.lane_of[position]]:
            queues[name].append(position)
    starts, ends = [-1.0] * len(program.actions), [-1.0] * len(program.actions)
    left: dict[int, float] = {}  # position -> seconds of work left, at rate 1
    now = 0.0
    while any(queues):
        wake = _start_ready(priced, queues, left, starts, ends, now)
        threads = sum(costs[program.lane_of[position]].threads for position in left)
        rate = min(1.0, priced.price.shared_cores / threads) if threads else 1.0
        step = min([work / rate for work in left.values()] + [at - now for at in wake])
        now += step
        for position in list(left):
            left[position] -= step * rate
            if left[position] <= 1e-12:
                del left[position]
                ends[position] = now
                for name in program.classes[program.lane_of[position]]:
                    queues[name].pop()
    return starts, ends


def _start_ready(
    priced: PricedProgram,
    queues: list[list[int]],
    left: dict[int, float],
    starts: list[float],
    ends: list[float],
    now: float,
) -> list[float]:
    """Start what can start now; returns the times at which inputs of others arrive."""
    program, wake = priced.program, []
    for position in {queue[-1] for queue in queues if queue}:
        lane = program.lane_of[position]
        if position in left or any(queues[name][-1] != position for name in program.classes[lane]):
            continue
        if any(ends[need] < 0 for need in program.needs[position]):
            continue
        arrival = max(
            [now]
            + [
                ends[need] + (priced.transfers[lane, other] if (other := program.lane_of[need]) != lane else 0.0)
                for need in program.needs[position]
            ]
        )
        if arrival <= now + 1e-12:
            cost = priced.price.costs[lane]
            left[position] = cost.backward_s if program.backward[position] else cost.forward_s
            starts[position] = now
        else:
            wake.append(arrival)
    return wake
