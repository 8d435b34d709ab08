"""Modules on any ranks (nested, partly overlapping, apart) put on top of each other in arrays, as far as there is room.

For every number of samples in flight each module has entries: a run of ranks, a row of its options, a unit, priced by
the cost model stage by stage. Entries of all modules are combined by broadcasting over the ranks:

    seconds of a rank = sum of its lanes' work         step = busiest rank + the way of a unit through the others
    bytes of a rank   = sum of what stays + its hungriest lane's unit + its largest workspace

An estimate, for ranking: of every kind of plan who leads by the step, by the busiest rank alone, and by bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.cost_model.model import CostModel, memory_limit_bytes
from megatron_mosaic.cost_model.price import exposed_s
from megatron_mosaic.cost_model.work import items_of_unit, list_lanes
from megatron_mosaic.errors import ProfileError
from megatron_mosaic.plan import ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.schedules import Kind
from megatron_mosaic.search.sketches.module_options import Floats, ModuleOptions
from megatron_mosaic.search.space import Space

MOST_CELLS = 3_000_000  # combinations x ranks that are held at once
_PER_PIPELINE = 3  # ways to lay out a module on so many ranks with so many stages that are priced
_PER_SET = (16, 8, 4, 2, 1)  # entries of a module on one run of ranks: as many as there is room for
_RANKED = 4096  # combinations that are told apart by kind
_OF_A_KIND = 3  # that go on: the first may turn out too large
_BY_RANK = ("busy_s", "unit_s", "static", "unit_bytes", "workspace")


@dataclass(frozen=True, slots=True)
class _Entries:
    """Of one module, by entry: what stands where; by entry and rank its seconds in a step and of a unit, and its bytes;
    the seconds of a unit through all stages; the number of its kind."""

    placed: list[ModulePlan]
    kind: NDArray[np.int64]
    chain_s: Floats
    busy_s: Floats
    unit_s: Floats
    static: Floats
    unit_bytes: Floats
    workspace: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlaid:
    """A plan under 1F1B with its estimates: of the step, of its busiest rank alone, of its fullest rank at least."""

    step_s: float
    busy_s: float
    bytes: float
    plan: Plan


class Overlay:
    """Overlaid plans of a space."""

    def __init__(self, space: Space, model: CostModel, options: Mapping[str, ModuleOptions]) -> None:
        self._space, self._model, self._options = space, model, options
        self._limit = memory_limit_bytes(space.cluster, space.config.memory_frac)

    def leading(self, samples: Sequence[int], keep: int, is_over: Callable[[], bool]) -> list[Overlaid]:
        """Of all numbers of samples together the first by each estimate, a few of each of `keep` kinds; by step. When
        time is over, of those numbers that were looked at."""
        counts = takewhile(lambda _: not is_over(), samples)
        found = [each for count in counts for each in self._overlaid(count, keep)]
        fitting = [x for x in found if x.bytes <= self._limit]
        most = _OF_A_KIND * keep
        chosen = sorted(fitting, key=lambda x: x.step_s)[:most] + sorted(fitting, key=lambda x: x.busy_s)[:most]
        chosen += sorted(found, key=lambda x: x.bytes)[: most // 4]
        return sorted({each.plan: each for each in chosen}.values(), key=lambda x: x.step_s)

    def _overlaid(self, samples: int, keep: int) -> Iterator[Overlaid]:
        modules = self._space.workload.modules
        by_size = {module.name: self._by_size(module, samples) for module in modules}
        runs = {m.name: [ranks for ranks in self._space.rank_sets(m) if len(ranks) in by_size[m.name]] for m in modules}
        if math.prod(map(len, runs.values())) > self._most_combinations:
            return  # no room for one way to lay out a module on each run
        entries = self._fitting([self._entries(m, by_size[m.name], runs[m.name], samples) for m in modules])
        if not entries:
            return
        shape = tuple(len(each.placed) for each in entries)
        step_s, busy_s, held, kind = self._combine(entries, shape)
        for at in _picks(step_s, busy_s, held, kind, self._limit, keep):
            placed = {
                module.name: each.placed[i] for module, each, i in zip(modules, entries, np.unravel_index(at, shape))
            }
            dp = placed[self._space.workload.backbone.name].layout.dp
            plan = self._space.make_plan(samples // dp, placed, ScheduleChoice("1f1b"))
            yield Overlaid(step_s=float(step_s[at]), busy_s=float(busy_s[at]), bytes=float(held[at]), plan=plan)

    @property
    def _most_combinations(self) -> float:
        return MOST_CELLS / self._space.cluster.num_ranks

    def _fitting(self, entries: list[list[list[_Entry]]]) -> list[_Entries]:
        """As many of each module on each run of ranks as there is room for; none where there is not."""
        for per_set in _PER_SET:
            chosen = [[each for on_set in own for each in on_set[:per_set]] for own in entries]
            if math.prod(map(len, chosen)) <= self._most_combinations:
                return [self._stacked(own) for own in chosen] if all(chosen) else []
        return []

    def _stacked(self, entries: Sequence[_Entry]) -> _Entries:
        by_rank = np.zeros((len(_BY_RANK), len(entries), self._space.cluster.num_ranks))
        for i, each in enumerate(entries):
            for ranks, values in each.stages:
                for first, stop in ranks.spans:
                    by_rank[:, i, first:stop] = np.array(values)[:, None]
        kinds: dict[object, int] = {}
        kind = [
            kinds.setdefault((x.placed.layout.pp, len(x.placed.ranks), x.placed.recompute), len(kinds)) for x in entries
        ]
        return _Entries(
            [each.placed for each in entries],
            np.array(kind, dtype=np.int64),
            np.array([each.chain_s for each in entries]),
            *by_rank,
        )

    def _combine(self, entries: Sequence[_Entries], shape: tuple[int, ...]) -> tuple[Floats, Floats, Floats, Floats]:
        """Flat over all combinations: the three estimates, and the number of the kind."""
        axes = range(len(entries))

        def spread(name: str) -> list[Floats]:
            """Of each module [entries, ...] -> one axis for each module, then the rest."""
            values = [getattr(each, name) for each in entries]
            return [x.reshape(*(len(x) if i == at else 1 for i in axes), *x.shape[1:]) for at, x in enumerate(values)]

        work = sum(spread("busy_s"))
        around_s = np.max(work - sum(spread("unit_s")), axis=-1) + sum(spread("chain_s"))
        busy_s = np.max(work, axis=-1)
        held = sum(spread("static"))
        for name in ("unit_bytes", "workspace"):
            most, *others = spread(name)
            for each in others:
                most = np.maximum(most, each)
            held = held + most
        number: Floats = np.zeros((1,) * len(entries))
        for each in spread("kind"):
            number = number * (each.max() + 1.0) + each
        values = (np.maximum(around_s, busy_s), busy_s, np.max(held, axis=-1), number)
        return tuple(np.broadcast_to(x, shape).ravel() for x in values)  # type: ignore[return-value]

    def _entries(
        self, module: ModuleConfig, by_size: Mapping[int, list[ModulePlan]], runs: Iterable[RankSet], samples: int
    ) -> list[list[_Entry]]:
        """By run of ranks, the module's front there, the leaders first."""
        priced, found = dict[object, list[_Entry]](), []
        for ranks in runs:
            where = self._like(ranks)
            if where not in priced:
                placed = [replace(each, ranks=ranks) for each in by_size[len(ranks)]]
                priced[where] = _ordered(self._priced(module, placed, samples))
            found.append([each.moved(ranks) for each in priced[where]])
        return found

    def _like(self, ranks: RankSet) -> object:
        """Sets with the same groups on the same places of nodes."""
        node = self._space.cluster.gpus_per_node
        if len(ranks.spans) > 1:
            return ranks
        is_inside = ranks.first // node == ranks.last // node
        return len(ranks), -1 if is_inside else ranks.first % node

    def _priced(self, module: ModuleConfig, placed: Sequence[ModulePlan], samples: int) -> Iterator[_Entry]:
        workload, model = self._space.workload, self._model
        num_microbatches = workload.global_batch_size // samples
        for each in placed:
            unit = max(1, each.unit)
            lanes = list_lanes(
                module,
                each,
                items=items_of_unit(module, samples * unit, each.layout.dp),
                num_units=-(-num_microbatches // unit),
                kinds=(Kind.F, Kind.B) if module.name in workload.has_backward else (Kind.F,),
                reaches_layers=workload.hidden_has_gradient(module.name),
                gpus_per_node=self._space.cluster.gpus_per_node,
            )
            try:
                costs = [model.stage_cost(lane.work) for lane in lanes]
            except ProfileError:
                continue  # nobody measured it: no candidate
            stages = []
            for lane, cost in zip(lanes, costs):
                never_hidden_s = exposed_s(cost.gradients_s, math.inf, model.source)
                tail_s = never_hidden_s + model.source.optimizer_s(cost.updated_parameters)
                unit_s, memory = each.layout.vpp * sum(cost.action_s.values()), cost.memory
                held = memory.static_bytes, memory.unit_bytes, memory.workspace_bytes
                stages.append((lane.ranks, (cost.busy_s + tail_s, unit_s, *held)))
            yield _Entry(placed=each, stages=tuple(stages))

    def _by_size(self, module: ModuleConfig, samples: int) -> dict[int, list[ModulePlan]]:
        """By number of ranks, ways to lay out the module there that may be worth pricing, on no ranks in particular."""
        space, options = self._space, self._options[module.name]
        num_microbatches = space.workload.global_batch_size // samples
        is_backbone = module is space.workload.backbone
        chosen = np.flatnonzero(self._may_run(options, samples)) if is_backbone else np.arange(len(options.rows))
        found: dict[int, list[ModulePlan]] = {}
        for unit in space.units(module, num_microbatches, min(4, num_microbatches)) if len(chosen) else ():
            covered = max(1, unit)
            items = np.ceil(samples * covered * module.items_per_sample / options.dp[chosen] - 1e-9).astype(np.int64)
            unit_s, held, live = options.costs(chosen, np.maximum(items, 1))
            busy_s = -(-num_microbatches // covered) * unit_s + options.tail_s[chosen]
            costs = np.stack([busy_s + options.pp[chosen] * unit_s, busy_s, held + live], axis=1)
            groups: dict[tuple[int, int], list[int]] = {}
            for i in np.flatnonzero(np.isfinite(busy_s)).tolist():
                layout = options.rows[chosen[i]].layout
                groups.setdefault((layout.num_ranks, layout.pp), []).append(i)
            for (size, _), at in groups.items():
                for i in _leaders(costs[at])[:_PER_PIPELINE]:
                    row = options.rows[chosen[at[i]]]
                    placed = ModulePlan(
                        ranks=RankSet.block(0, size),
                        layout=row.layout,
                        unit=unit,
                        recompute=row.recompute,
                        sequence_parallel=row.sequence_parallel,
                    )
                    found.setdefault(size, []).append(placed)
        return found

    def _may_run(self, options: ModuleOptions, samples: int) -> NDArray[np.bool_]:
        sizes = {dp: self._space.micro_batch_sizes(dp) for dp in set(options.dp.tolist())}
        return np.array([samples % dp == 0 and samples // dp in sizes[dp] for dp in options.dp.tolist()], dtype=bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A module on ranks; of each of its stages the ranks and the values of `_BY_RANK`."""

    placed: ModulePlan
    stages: tuple[tuple[RankSet, tuple[float, ...]], ...]

    @property
    def chain_s(self) -> float:
        return sum(values[1] for _, values in self.stages)

    @property
    def costs(self) -> tuple[float, float, float]:
        """Of its work and the way through it, of its work, and bytes."""
        busy_s = max(values[0] for _, values in self.stages)
        return busy_s + self.chain_s, busy_s, max(sum(values[2:]) for _, values in self.stages)

    def moved(self, ranks: RankSet) -> _Entry:
        """On other ranks of the same kind."""
        if ranks == self.placed.ranks:
            return self
        placed = replace(self.placed, ranks=ranks)
        stages = tuple((placed.stage_ranks(i), values) for i, (_, values) in enumerate(self.stages))
        return _Entry(placed=placed, stages=stages)


def _ordered(entries: Iterable[_Entry]) -> list[_Entry]:
    """The leaders among all, in turns, then those among the pipelines of each length: what a longer one costs in a
    schedule, their costs do not say."""
    every = list(entries)
    costs = np.array([each.costs for each in every]).reshape(-1, 3)
    found = _leaders(costs)
    for pp in sorted({each.placed.layout.pp for each in every}):
        at = [i for i, each in enumerate(every) if each.placed.layout.pp == pp]
        found += [at[i] for i in _leaders(costs[at])]
    return [every[i] for i in dict.fromkeys(found)]


def _leaders(costs: Floats) -> list[int]:
    """Positions of rows that no other is as good as or better by all columns: in turns the first by each."""
    front: list[int] = []
    for i in np.lexsort(costs.T[::-1]).tolist():
        if not any((costs[j] <= costs[i]).all() for j in front):
            front.append(i)
    queues = [sorted(front, key=lambda i: (costs[i, k], costs[i, 0])) for k in range(costs.shape[1])]
    return list(dict.fromkeys(i for each in zip(*queues) for i in each))


def _picks(step_s: Floats, busy_s: Floats, held: Floats, kind: Floats, limit: float, keep: int) -> list[int]:
    """Flat positions: the first of each kind by step and by work, as far as they fit, and by bytes."""
    fits, found = held <= limit, dict[int, None]()
    for values, most in (
        (np.where(fits, step_s, math.inf), keep),
        (np.where(fits, busy_s, math.inf), keep),
        (held, max(1, keep // 4)),
    ):
        count = min(_RANKED, len(values))
        at = np.argpartition(values, count - 1)[:count]
        at = at[np.argsort(values[at], kind="stable")]
        at = at[np.isfinite(values[at])]
        for _ in range(_OF_A_KIND):
            _, first = np.unique(kind[at], return_index=True)
            found |= dict.fromkeys(at[np.sort(first)[:most]].tolist())
            at = np.delete(at, first)
    return list(found)
