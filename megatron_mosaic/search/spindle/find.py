"""The best plan in waves of every family, and of all: families meet every choice of tp and recomputation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.effects.counts import module_parameters
from megatron_mosaic.cost_model.effects.memory import stage_memory
from megatron_mosaic.cost_model.model import CostModel, memory_limit_bytes
from megatron_mosaic.cost_model.waves.slices import list_pools
from megatron_mosaic.cost_model.waves.step import WaveClock, WaveStep
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout, Prediction, RankSet, Recompute
from megatron_mosaic.plan.tasks.waves import Slice, WavePlan, Waves, validate_waves
from megatron_mosaic.plan.workload import ModuleConfig
from megatron_mosaic.search.greedy import NoFeasiblePlan
from megatron_mosaic.search.space import SearchConfig
from megatron_mosaic.search.spindle.allocate import relaxed_optimum_s
from megatron_mosaic.search.spindle.families import FAMILIES
from megatron_mosaic.search.spindle.metaops import Choice, by_level, contract
from megatron_mosaic.search.spindle.placement import Placer
from megatron_mosaic.units import format_bytes

_STATIC_FRAC = 0.5  # of a device's memory that a module's parameters may take: the rest is for activations
_LARGE = 1e9  # parameters of a module for which twice the least tp is tried too


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan with its step. `best_s`: C* of the MetaOps that it was made of, without transfers and gradients."""

    plan: WavePlan
    step: WaveStep
    best_s: float
    choice: Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveSearch:
    """The best of each family that has a plan that fits."""

    families: dict[str, Found | None]
    search_s: float
    evaluated: int

    @property
    def best(self) -> tuple[str, Found]:
        """Of all, with its family."""
        found = [(name, each) for name, each in self.families.items() if each is not None]
        return min(found, key=lambda pair: pair[1].step.step_s)


def find_waves(model: CostModel, config: SearchConfig) -> WaveSearch:
    """Every family's best plan for a workload of tasks. NoFeasiblePlan where no family has one that fits."""
    _require_free(config)
    began = time.perf_counter()
    clock = WaveClock(model)
    limit_bytes = memory_limit_bytes(model.cluster, config.memory_frac)
    best: dict[str, Found | None] = dict.fromkeys(FAMILIES)
    evaluated = 0
    for choice in list_choices(clock, config, limit_bytes):
        ops = contract(model, clock.uses, choice, limit_bytes)
        if ops is None:
            continue
        placer = Placer(
            clock=clock,
            recompute=choice.recompute,
            memory_bytes=limit_bytes,
            num_ranks=model.cluster.num_ranks,
            gpus_per_node=model.cluster.gpus_per_node,
        )
        best_s = sum(relaxed_optimum_s(level, placer.num_ranks) for level in by_level(ops))
        for name, family in FAMILIES.items():
            for waves in family.plans(ops, placer):
                evaluated += 1
                found = None if waves is None else price_waves(clock, waves, best_s, choice)
                if found is None or found.step.peak_bytes > limit_bytes:
                    continue
                rival = best[name]
                if rival is None or found.step.step_s < rival.step.step_s:
                    best[name] = found
    if not any(best.values()):
        raise NoFeasiblePlan(
            f"workload {model.workload.name!r} on {model.cluster.name!r}",
            got=f"{evaluated} plans in waves, none of which fits into {format_bytes(limit_bytes)} a device"
            if evaluated
            else f"a module whose activations fit into {format_bytes(limit_bytes)} a device on no number of devices",
            expected="samples of a step whose activations fit on the cluster at once: waves have no microbatches",
            fix="lower workload.global_batch_size, add nodes, or set workload.training.sharding=optimizer",
        )
    return WaveSearch(families=best, search_s=time.perf_counter() - began, evaluated=evaluated)


def price_waves(clock: WaveClock, waves: Waves, best_s: float, choice: Choice) -> Found:
    """The plan of these waves, with what it is predicted to do."""
    model = clock.model
    plan = WavePlan(
        workload=model.workload.name,
        digest=model.workload.digest,
        world_size=model.cluster.num_ranks,
        global_batch_size=model.workload.global_batch_size,
        waves=waves,
    )
    validate_waves(plan, model.workload)
    step = clock.simulate(plan)
    predicted = Prediction(step_s=step.step_s, peak_bytes=step.peak_bytes, cost_model=model.name)
    return Found(plan=replace(plan, predicted=predicted), step=step, best_s=best_s, choice=choice)


def list_choices(clock: WaveClock, config: SearchConfig, limit_bytes: float) -> Iterator[Choice]:
    """The least tp of each module with which its parameters leave room, then twice that for large ones; each without
    recomputation and with it."""
    workload, most = clock.workload, min(config.max_tp, clock.model.cluster.gpus_per_node)
    degrees = {module.name: _degrees(module, most) for module in workload.modules}
    least = {m.name: _least_tp(clock, m, degrees[m.name], _STATIC_FRAC * limit_bytes) for m in workload.modules}
    twice = {
        m.name: 2 * least[m.name]
        if 2 * least[m.name] in degrees[m.name] and module_parameters(m) > _LARGE
        else least[m.name]
        for m in workload.modules
    }
    for tp in (least, twice) if twice != least else (least,):
        for recompute in (Recompute.none, Recompute.full):
            yield Choice(tp=tp, recompute=recompute)


def _degrees(module: ModuleConfig, most: int) -> list[int]:
    sizes = module.num_heads, module.query_groups, module.ffn_hidden_size, module.vocab_size
    powers = [2**i for i in range(most.bit_length())]
    return [tp for tp in powers if tp <= most and not any(size % tp for size in sizes)]


def _least_tp(clock: WaveClock, module: ModuleConfig, degrees: list[int], limit_bytes: float) -> int:
    """With its optimizer on all ranks, as sharding splits it at best."""
    source, cluster = clock.model.source, clock.model.cluster
    task = next(task for task, name in clock.uses if name == module.name)
    for tp in degrees:
        everywhere = Slice(
            task=task,
            module=module.name,
            first_layer=0,
            num_layers=module.num_layers,
            ranks=RankSet.block(0, cluster.num_ranks // tp * tp),
            layout=Layout(tp=tp, dp=cluster.num_ranks // tp),
        )
        (pool,) = list_pools([everywhere], clock.workload, cluster.gpus_per_node)
        if stage_memory(pool.work, source.precision, source.setup).static_bytes <= limit_bytes:
            return tp
    return degrees[-1]


def _require_free(config: SearchConfig) -> None:
    """ConfigError for what this search does not follow."""
    pinned = config.pin.model_dump(exclude_defaults=True) or config.exclude.model_dump(exclude_defaults=True)
    for key, wrong, got in (
        ("pin, search.exclude", pinned, pinned),
        ("algorithm", config.algorithm != "greedy", config.algorithm),
        ("time_budget_s", config.time_budget_s, config.time_budget_s),
    ):
        if wrong:
            raise ConfigError(
                f"search.{key}",
                got=got,
                expected="the default: plans in waves, for several tasks, are searched in one way only, in seconds",
                fix="leave it out",
            )
