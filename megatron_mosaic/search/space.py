"""Which plans are legal: layouts of a module on n ranks, rank sets, micro-batch sizes, shares.

Every plan has a schedule (a test), and is within the limits of the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, ScheduleChoice
from megatron_mosaic.plan.cluster import Cluster
from megatron_mosaic.plan.quota import grantable_counts
from megatron_mosaic.plan.validate import RUNTIME
from megatron_mosaic.plan.workload import ModuleConfig, Workload

# What the search does not choose yet: cp, vpp, ep and etp are 1 and a unit is one microbatch in every plan
SCHEDULE = ScheduleChoice("1f1b")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """What the search may choose from. `min_gain_frac`: a move that gains less is not taken."""

    max_tp: int = 8
    max_pp: int = 8
    max_micro_batch_size: int = 8
    memory_frac: float = 0.9
    min_gain_frac: float = 0.002

    def __post_init__(self) -> None:
        for key in ("max_tp", "max_pp", "max_micro_batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"search.{key}", got=getattr(self, key), expected="at least 1", fix=f"set {key}")
        if not 0 < self.memory_frac <= 1:
            raise ConfigError("search.memory_frac", got=self.memory_frac, expected="in (0, 1]", fix="set memory_frac")
        if not 0 <= self.min_gain_frac < 1:
            raise ConfigError(
                "search.min_gain_frac", got=self.min_gain_frac, expected="in [0, 1)", fix="set min_gain_frac"
            )


@cache
def divisors(n: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    return tuple(d for d in range(1, n + 1) if n % d == 0)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The plans of a workload on a cluster."""

    workload: Workload
    cluster: Cluster
    config: SearchConfig

    def layouts(self, module: ModuleConfig, num_ranks: int) -> tuple[Layout, ...]:
        """tp x pp x dp = num_ranks, where tp divides what Megatron splits and stays on one node, pp the layers."""
        found = []
        for tp in divisors(num_ranks):
            split = (module.num_heads, module.query_groups, module.ffn_hidden_size)
            if tp > min(self.config.max_tp, self.cluster.gpus_per_node) or any(size % tp for size in split):
                continue
            for pp in divisors(num_ranks // tp):
                dp = num_ranks // tp // pp
                if pp > self.config.max_pp or module.num_layers % pp or not self._dp_fits(module, dp):
                    continue
                found.append(Layout(tp=tp, pp=pp, dp=dp))
        return tuple(found)

    def _dp_fits(self, module: ModuleConfig, dp: int) -> bool:
        """The backbone's lanes share the batch evenly; another module has no use for more lanes than items."""
        batch = self.workload.global_batch_size
        if module.name == self.workload.backbone.name:
            return batch % dp == 0
        return dp <= batch * module.items_per_sample

    def rank_sets(self) -> tuple[RankSet, ...]:
        """All ranks, and the aligned blocks of each size that divides them, largest first."""
        return self._rank_sets

    @cached_property
    def _rank_sets(self) -> tuple[RankSet, ...]:
        n = self.cluster.num_ranks
        return tuple(RankSet.block(start, size) for size in reversed(divisors(n)) for start in range(0, n, size))

    def micro_batch_sizes(self, backbone_dp: int) -> tuple[int, ...]:
        """Divisors of a lane's share of the batch."""
        share = self.workload.global_batch_size // backbone_dp
        return tuple(size for size in divisors(share) if size <= self.config.max_micro_batch_size)

    def quotas(self) -> tuple[Quota, ...]:
        """Shares at the granularity that is granted, largest first."""
        gpu = self.cluster.gpu
        if not self.cluster.shared_cores and not RUNTIME.shares_of_gpus:
            return (Quota(),)
        counts = grantable_counts(gpu.num_sms, gpu.sm_granularity)
        return tuple(Quota(share=round(count / gpu.num_sms, 6)) for count in reversed(counts))

    def placements(self, module: ModuleConfig) -> Iterator[ModulePlan]:
        """Every rank set with every layout on it, whole devices."""
        for ranks in self.rank_sets():
            for layout in self.layouts(module, len(ranks)):
                yield ModulePlan(ranks=ranks, layout=layout)

    def make_plan(self, micro_batch_size: int, modules: dict[str, ModulePlan]) -> Plan:
        """A plan of this space, with the search's schedule."""
        return Plan(
            workload=self.workload.name,
            digest=self.workload.digest,
            world_size=self.cluster.num_ranks,
            global_batch_size=self.workload.global_batch_size,
            micro_batch_size=micro_batch_size,
            schedule=SCHEDULE,
            modules={module.name: modules[module.name] for module in self.workload.modules},
        )
