"""Which plans are legal: layouts of a module on n ranks, recomputation, rank sets, units, micro-batches, schedules.

Every plan of the space passes `validate_plan`; a schedule that cannot order a plan says so when it is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import isqrt

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, ScheduleChoice
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.layout import Recompute
from megatron_mosaic.plan.plan import CONCURRENT
from megatron_mosaic.plan.quota import grantable_counts
from megatron_mosaic.plan.training import DEFAULT_SETUP, TrainingSetup
from megatron_mosaic.plan.validate import RUNTIME
from megatron_mosaic.plan.workload import ModuleConfig, Workload
from megatron_mosaic.schedules import SCHEDULES
from megatron_mosaic.search.pins import Exclusions, Pins

_COUNTS = ("max_tp", "max_cp", "max_pp", "max_vpp", "max_ep", "max_micro_batch_size")
_MIN_TOKENS_PER_RANK = 256  # of an item: a cp group is not worth its messages for less
_UNITS = (1, 2, 4, 8, 16)
SMALL_RANKS = 8  # clusters on which every run of ranks is tried
SMALL_BATCH = 64  # up to which pairs of moves and all baselines are tried there
SLOW_TO_BUILD = frozenset({"bubble_fill"})  # schedules that are tried on the plan in hand only


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """What the search may choose from. `min_gain_frac`: a move that gains less is not taken."""

    max_tp: int = 8
    max_cp: int = 8
    max_pp: int = 16
    max_vpp: int = 4
    max_ep: int = 8
    max_micro_batch_size: int = 8
    memory_frac: float = 0.9
    min_gain_frac: float = 0.002
    time_budget_s: float = 0.0  # 0: none
    algorithm: str = "greedy"
    pin: Pins = field(default_factory=Pins)
    exclude: Exclusions = field(default_factory=Exclusions)

    def __post_init__(self) -> None:
        for key in _COUNTS:
            if getattr(self, key) < 1:
                raise ConfigError(f"search.{key}", got=getattr(self, key), expected="at least 1", fix=f"set {key}")
        for key, right, expected in (
            ("memory_frac", 0 < self.memory_frac <= 1, "in (0, 1]"),
            ("min_gain_frac", 0 <= self.min_gain_frac < 1, "in [0, 1)"),
            ("time_budget_s", self.time_budget_s >= 0, "seconds; 0: none"),
            (
                "time_budget_s",
                not self.time_budget_s or self.algorithm != "exhaustive",
                "0 with search.algorithm=exhaustive, which has no best plan so far",
            ),
            ("algorithm", self.algorithm in ("greedy", "exhaustive"), "greedy or exhaustive"),
        ):
            if not right:
                raise ConfigError(f"search.{key}", got=getattr(self, key), expected=expected, fix=f"set {key}")


@cache
def divisors(n: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*low, *(n // d for d in low)}))


@dataclass(frozen=True, kw_only=True)
class Space:
    """The plans of a workload on a cluster, trained like `setup`."""

    workload: Workload
    cluster: Cluster
    config: SearchConfig
    setup: TrainingSetup = DEFAULT_SETUP

    @property
    def is_small(self) -> bool:
        """Whether there is time for pairs of moves, and for every baseline as a start."""
        return self.cluster.num_ranks <= SMALL_RANKS and self.workload.global_batch_size <= SMALL_BATCH

    def layouts(self, module: ModuleConfig, num_ranks: int) -> tuple[Layout, ...]:
        """tp x cp x pp x dp = num_ranks without virtual stages: tp divides what Megatron splits and stays on a node."""
        return self._layouts(module, num_ranks)

    @cached_property
    def _layouts(self) -> _Layouts:
        return _Layouts(self)

    def dp_fits(self, module: ModuleConfig, dp: int) -> bool:
        """The backbone's lanes share the batch evenly; another module has no use for more lanes than items."""
        batch = self.workload.global_batch_size
        if module.name == self.workload.backbone.name:
            return batch % dp == 0
        return dp <= batch * module.items_per_sample

    def chunked(self, module: ModuleConfig, layout: Layout) -> tuple[Layout, ...]:
        """The layout with every number of virtual stages; itself first."""
        pin = self.config.pin.of(module.name).layout
        limit = min(self.config.max_vpp, module.num_layers // layout.pp) if layout.pp > 1 else 1
        found = [replace(layout, vpp=vpp) for vpp in range(1, limit + 1) if module.num_layers % (layout.pp * vpp) == 0]
        return tuple(each for each in found if pin.allows(each))

    def sequence_parallel(self, module: ModuleConfig, layout: Layout) -> tuple[bool, ...]:
        """The usual choice first: on, wherever tokens can be split (tp ranks hold less and send as much)."""
        if layout.tp == 1:
            choices: tuple[bool, ...] = (False,)
        elif module.tokens_per_item % (layout.tp * (2 * layout.cp if layout.cp > 1 else 1)):
            choices = () if module.num_experts else (False,)
        else:
            choices = (True,) if module.num_experts else (True, False)
        pinned = self.config.pin.of(module.name).sequence_parallel
        return tuple(each for each in choices if pinned in (None, each))

    def recomputes(self, module: ModuleConfig) -> tuple[Recompute, ...]:
        """Least first. Selective is nothing where attention is fused and keeps no matrix."""
        pinned = self.config.pin.of(module.name).recompute
        if pinned is not None:
            return (pinned,)
        left_out = {*self.config.exclude.recompute} | ({Recompute.selective} if self.setup.fused_attention else set())
        if module.name not in self.workload.has_backward:
            left_out = {*Recompute} - {Recompute.none}
        return tuple(each for each in Recompute if each not in left_out)

    def units(self, module: ModuleConfig, num_microbatches: int, backbone_pp: int) -> tuple[int, ...]:
        """Microbatches of the backbone that one action of the module covers."""
        if module.name == self.workload.backbone.name:
            return (1,)
        pinned = self.config.pin.of(module.name).unit
        if pinned is not None:
            return (pinned,)
        return tuple(unit for unit in sorted({*_UNITS, backbone_pp}) if unit <= max(1, num_microbatches))

    def sizes(self) -> tuple[int, ...]:
        """Numbers of ranks worth trying, largest first: all on a node or two; whole nodes above, in halves and quarters
        of the cluster, powers of two, and what these leave."""
        n, node = self.cluster.num_ranks, self.cluster.gpus_per_node
        if n <= 2 * node:
            return tuple(range(n, 0, -1))
        found = {size for size in divisors(node)} | {node * d for d in divisors(self.cluster.num_nodes)}
        found |= {node << k for k in range(n.bit_length()) if node << k <= n}
        found |= {n * part // 8 // node * node for part in range(1, 8)}
        found |= {n - size for size in found if size % node == 0}
        return tuple(sorted((size for size in found if size > 0), reverse=True))

    def rank_sets(self, module: ModuleConfig) -> tuple[RankSet, ...]:
        """Every run of consecutive ranks, largest first."""
        pinned, n = self.config.pin.of(module.name).rank_set, self.cluster.num_ranks
        if pinned is not None:
            return (pinned,)
        return tuple(RankSet.block(start, size) for size in range(n, 0, -1) for start in range(n - size + 1))

    def micro_batch_sizes(self, backbone_dp: int) -> tuple[int, ...]:
        """Divisors of a lane's share of the batch."""
        share, pinned = self.workload.global_batch_size // backbone_dp, self.config.pin.micro_batch_size
        found = [size for size in divisors(share) if size <= self.config.max_micro_batch_size]
        if pinned is not None:
            found = [pinned] if share % pinned == 0 else []
        return tuple(found)

    def schedules(self, is_chunked: bool) -> tuple[ScheduleChoice, ...]:
        """Those that may order a plan with (or without) virtual stages."""
        one = len(self.workload.modules) == 1
        found = []
        for name in SCHEDULES:
            usual = {"1f1b": not is_chunked, "interleaved": is_chunked}.get(name, not one)
            if usual and (name not in CONCURRENT or len(self.quotas()) > 1):
                found.append(name)
        pinned, excluded = self.config.pin.schedule, self.config.exclude.schedule
        return tuple(ScheduleChoice(n) for n in found if pinned in (None, n) and n not in excluded)

    def quotas(self) -> tuple[Quota, ...]:
        """Shares at the granularity that is granted, largest first."""
        gpu = self.cluster.gpu
        if not self.cluster.shared_cores and not RUNTIME.shares_of_gpus:
            return (Quota(),)
        counts = grantable_counts(gpu.num_sms, gpu.sm_granularity)
        return tuple(Quota(share=round(count / gpu.num_sms, 6)) for count in reversed(counts))

    def allows(self, plan: Plan) -> bool:
        """Whether pins and exclusions do, and every unit is one of the space's."""
        backbone = self.workload.backbone.name
        microbatches, pp = plan.num_microbatches(backbone), plan.modules[backbone].layout.pp
        return (
            self.config.pin.allows(plan)
            and self.config.exclude.allows(plan, self.workload.has_backward)
            and all(plan.modules[m.name].unit in self.units(m, microbatches, pp) for m in self.workload.modules)
        )

    def variants(self, module: ModuleConfig, ranks: RankSet) -> Iterator[ModulePlan]:
        """Every layout on these ranks with virtual stages, sequence parallelism and recomputation; a unit of one."""
        for layout in self.layouts(module, len(ranks)):
            for chunked in self.chunked(module, layout):
                for split in self.sequence_parallel(module, chunked):
                    for again in self.recomputes(module):
                        yield ModulePlan(ranks=ranks, layout=chunked, unit=1, recompute=again, sequence_parallel=split)

    def make_plan(self, micro_batch_size: int, modules: dict[str, ModulePlan], schedule: ScheduleChoice) -> Plan:
        """A plan of this workload on all ranks of the cluster."""
        return Plan(
            workload=self.workload.name,
            digest=self.workload.digest,
            world_size=self.cluster.num_ranks,
            global_batch_size=self.workload.global_batch_size,
            micro_batch_size=micro_batch_size,
            schedule=schedule,
            modules={module.name: modules[module.name] for module in self.workload.modules},
        )


class _Layouts:
    """Layouts by module and number of ranks, each worked out once."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._found: dict[tuple[ModuleConfig, int], tuple[Layout, ...]] = {}

    def __call__(self, module: ModuleConfig, num_ranks: int) -> tuple[Layout, ...]:
        key = module, num_ranks
        if key not in self._found:
            pin = self._space.config.pin.of(module.name).layout.model_copy(update={"vpp": None})
            self._found[key] = tuple(filter(pin.allows, self._list(module, num_ranks)))
        return self._found[key]

    def _list(self, module: ModuleConfig, num_ranks: int) -> Iterator[Layout]:
        config = self._space.config
        for tp in divisors(num_ranks):
            split = (module.num_heads, module.query_groups, module.ffn_hidden_size, module.vocab_size)
            if tp > min(config.max_tp, self._space.cluster.gpus_per_node) or any(size % tp for size in split):
                continue
            for cp in divisors(num_ranks // tp):
                fewest = module.tokens_per_item // cp
                if cp > 1 and (
                    cp > config.max_cp or module.tokens_per_item % (2 * cp) or fewest < _MIN_TOKENS_PER_RANK
                ):
                    continue
                for pp in divisors(num_ranks // tp // cp):
                    dp = num_ranks // tp // cp // pp
                    if pp > config.max_pp or module.num_layers % pp or not self._space.dp_fits(module, dp):
                        continue
                    for ep, etp in self._experts(module, tp, tp * cp * dp):
                        yield Layout(tp=tp, cp=cp, pp=pp, dp=dp, ep=ep, etp=etp)

    def _experts(self, module: ModuleConfig, tp: int, stage_ranks: int) -> Iterator[tuple[int, int]]:
        """(ep, etp): all experts' matrices whole, or split like the dense ones."""
        if not module.num_experts:
            yield 1, 1
            return
        for etp in dict.fromkeys((1, tp)):
            for ep in divisors(module.num_experts):
                if (
                    ep <= self._space.config.max_ep
                    and stage_ranks % (ep * etp) == 0
                    and module.ffn_hidden_size % etp == 0
                ):
                    yield ep, etp
