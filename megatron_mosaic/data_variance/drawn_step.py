"""A step of one drawn batch: its items on the slots that training would choose, each unit at its own price.

    drawn items --SlotRule (the runtime's)--> items of each dp slot, padded to its longest
                --price_stage--> seconds and bytes of each slot's unit --> the cost model's clock

Every dp slot is simulated by itself: replicas wait for one another at the end only, so that what one has more of in one
microbatch it may have less of in the next. Messages between modules stay at their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_mosaic.cost_model.clock.program import Program, fold
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.price import StageCost, StepPrice, price_stage
from megatron_mosaic.cost_model.simulate import simulate_jobs
from megatron_mosaic.cost_model.work import StageWork, list_stage_work
from megatron_mosaic.data_variance.draw import Batch
from megatron_mosaic.errors import ConfigError, ProfileError
from megatron_mosaic.parallel_state_ext.boundaries.balance import Slots
from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, padded_length
from megatron_mosaic.parallel_state_ext.boundaries.slots import SlotRule
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.tasks.histogram import NO_HISTOGRAM
from megatron_mosaic.schedules import Kind, Schedule, build_schedule
from megatron_mosaic.schedules.actions import FREES

Load = tuple[int, int]  # items of one slot in one unit, and their tokens each, padding included


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnStep:
    """`imbalance`: by module, load of the busiest slot over the mean, mean over its units."""

    step_s: float
    peak_bytes: float
    imbalance: Mapping[str, float]


class StepsOfPlan:
    """Simulates drawn batches of one plan; prices are kept."""

    def __init__(self, plan: Plan, model: CostModel, schedule: Schedule | None = None) -> None:
        """ProfileError for items of lengths that were not measured on this machine, ConfigError for tasks."""
        workload = model.workload
        _validate_measured(model)
        if workload.tasks:
            raise ConfigError(
                f"workload {workload.name!r}: drawn batches",
                got=f"{len(workload.tasks)} tasks",
                expected="one: samples of several tasks are not drawn yet",
                fix="draw no batches (--draws 0)",
            )
        self._plan, self._model = plan, model
        work = replace(list_stage_work(plan, workload, model.cluster.gpus_per_node), slots_apart=True)
        self._price: StepPrice = model.price_work(work)
        self._program = _row_by_row(fold(schedule or build_schedule(plan, workload), work.graph, work.replicas.classes))
        self._rules = {module.name: SlotRule(plan, workload, module.name) for module in workload.modules}
        self._costs: dict[tuple[int, Load], StageCost] = {}
        self._first = work.replicas.classes.first

    @property
    def num_microbatches(self) -> int:
        return self._price.work.graph.num_microbatches

    @property
    def samples_each(self) -> int:
        """Of a microbatch, over all slots of the backbone."""
        return self._price.work.num_samples // self.num_microbatches

    def simulate(self, batch: Batch) -> DrawnStep:
        """The step of this batch."""
        graph, program = self._price.work.graph, self._program
        units: dict[str, list[list[Load]]] = {}
        imbalance: dict[str, float] = {}
        for name, rule in self._rules.items():
            chosen = [
                rule.choose([batch[i] for i in graph.microbatches_of(name, unit)])
                for unit in range(graph.num_units(name))
            ]
            units[name] = [self._loads(name, each.tokens, each.slots) for each in chosen]
            imbalance[name] = sum(each.imbalance[1] for each in chosen) / len(chosen)
        loads = [self._load_of(row, units) for row in range(len(program.slots))]
        costs = [self._cost(program.lane_of[slot], load) for slot, load in zip(program.slots, loads)]
        row_s = [cost.seconds(kind) if load[0] else 0.0 for cost, load, (_, kind) in zip(costs, loads, program.jobs)]
        bytes_of = [cost.memory.unit_bytes if load[0] else 0.0 for cost, load in zip(costs, loads)]
        return DrawnStep(
            step_s=simulate_jobs(self._price, program, row_s).step_s,
            peak_bytes=self._peak_bytes(bytes_of, [cost.memory.workspace_bytes for cost in costs]),
            imbalance=imbalance,
        )

    def _loads(self, name: str, tokens: Integers, slots: Slots) -> list[Load]:
        """By slot. An item's padding ends at a whole row, so that sizes divide."""
        placed, merge = self._plan.modules[name], self._model.workload.by_name[name].merge_tokens
        found = []
        for items in slots:
            longest = padded_length(placed, int(tokens[items].max()) if len(items) else 0)
            found.append((len(items), -(-longest // merge) * merge))
        return found

    def _load_of(self, row: int, units: Mapping[str, list[list[Load]]]) -> Load:
        """Of the clock's slot: where experts lie on several dp slots these go together, as fast as the busiest."""
        program = self._program
        action, slot = program.schedule.order[program.entry[row]], program.slots[row]
        lane, loads = program.lane_of[slot], units[action.module][action.unit]
        layout = self._plan.modules[action.module].layout
        together = len(loads) // (self._first[lane + 1] - self._first[lane])
        start = together * (slot - self._first[lane])
        load = max(loads[start : start + together], key=math.prod)
        if not load[0] and any(items for items, _ in loads) and layout.ep * layout.etp > 1:
            return (1, max(tokens for _, tokens in loads))  # so that experts hear from every slot
        return load

    def _cost(self, lane: int, load: Load) -> StageCost:
        """Of a unit of so many items of so many tokens; of none, that of the mean (nothing is asked of it)."""
        items, tokens = load
        if not items:
            return self._price.costs[lane]
        if (lane, load) not in self._costs:
            work: StageWork = self._price.work.lanes[lane].work
            module = replace(work.module, tokens_per_item=tokens, tokens_histogram=NO_HISTOGRAM)
            drawn = replace(work, module=module, items=items)
            self._costs[lane, load] = price_stage(drawn, self._model.source)
        return self._costs[lane, load]

    @cached_property
    def _frees(self) -> tuple[int, ...]:
        """By row: 1 a forward whose activations stay, 0 one whose end with it, -1 what frees a forward's."""
        program = self._program
        trained = {lane for lane, kind in program.jobs if kind in FREES}
        return tuple(
            -1 if kind in FREES else int(lane in trained) if kind is Kind.F else 0 for lane, kind in program.jobs
        )

    @cached_property
    def _rows_of_kind(self) -> tuple[tuple[int, ...], ...]:
        """By kind of ranks, the rows that it runs, in their order."""
        by_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(self._program.slots):
            by_slot.setdefault(slot, []).append(row)
        kinds = self._price.work.replicas.kinds
        return tuple(tuple(sorted(row for each in kind.slot_classes for row in by_slot[each])) for kind in kinds)

    def _peak_bytes(self, bytes_of: Sequence[float], workspace: Sequence[float]) -> float:
        """Of the fullest rank: what its lanes always hold, its units as they come and go, the largest workspace."""
        lane_of, slots, frees, peak = self._program.lane_of, self._program.slots, self._frees, 0.0
        for kind, rows in zip(self._price.work.replicas.kinds, self._rows_of_kind):
            held = most = 0.0
            for row in rows:
                if frees[row] < 0:
                    held -= bytes_of[row]
                    continue
                most = max(most, held + bytes_of[row])
                held += bytes_of[row] * frees[row]
            static = sum(self._price.costs[lane_of[each]].memory.static_bytes for each in kind.slot_classes)
            least = max(self._price.costs[lane_of[slots[row]]].memory.workspace_bytes for row in rows)
            peak = max(peak, static + most + max([least, *[workspace[row] for row in rows]]))
        return peak


def _row_by_row(program: Program) -> Program:
    """Each row a job of its own."""
    jobs = tuple(program.jobs[job] for job in program.job)
    return replace(program, job=tuple(range(len(jobs))), jobs=jobs)


def _validate_measured(model: CostModel) -> None:
    for module in model.workload.modules if model.cluster.shared_cores else ():
        if module.tokens_histogram:
            raise ProfileError(
                f"modules.{module.name}.tokens_per_item",
                got="a histogram",
                expected="one number: a profile of this machine holds items of one length",
                fix="draw no batches (--draws 0), or predict for a cluster of GPUs",
            )
