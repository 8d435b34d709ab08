"""The plan: which module runs where, in which layout, with which share of a GPU, in which order.

The planner writes it without a GPU, the runtime obeys it without a search. `plan_file.py` reads and writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

from megatron_mosaic.cluster import Cluster
from megatron_mosaic.errors import PlanError
from megatron_mosaic.workload import ModuleConfig, Workload
from megatron_mosaic.yaml_text import MAX_COUNT

_SPAN = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MAX_RANK_DIGITS = len(str(MAX_COUNT))


class Recompute(StrEnum):
    """Which activations the backward pass computes again."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of one module's parallel axes. Ranks are laid out tp fastest, then cp, dp, pp slowest."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            if getattr(self, axis.name) < 1:
                raise PlanError(
                    f"layout.{axis.name}", got=getattr(self, axis.name), expected="at least 1", fix=f"set {axis.name}"
                )
        if self.vpp > 1 and self.pp == 1:
            raise PlanError("layout.vpp", got=self.vpp, expected="1 with pp 1", fix="set vpp: 1, or raise pp")
        if self.num_ranks // self.pp % (self.ep * self.etp):
            raise PlanError(
                "layout.ep",
                got=f"ep {self.ep} x etp {self.etp}",
                expected=f"a divisor of the {self.num_ranks // self.pp} ranks of a pipeline stage",
                fix="change ep or etp",
            )

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def __str__(self) -> str:
        degrees = [f"{a.name}{getattr(self, a.name)}" for a in fields(self) if getattr(self, a.name) != 1]
        return " ".join(degrees) or "single"


@dataclass(frozen=True, slots=True)
class RankSet:
    """Global ranks, sorted and unique. Written `0-3,8-11`."""

    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ranks or any(rank < 0 for rank in self.ranks) or list(self.ranks) != sorted(set(self.ranks)):
            raise PlanError(
                "ranks", got=self.ranks, expected="one or more ranks, ascending, each once", fix="sort and deduplicate"
            )

    @classmethod
    def parse(cls, text: str) -> RankSet:
        """`"0-3,8"` -> ranks 0, 1, 2, 3, 8. Strict: ascending spans that do not overlap."""
        ranks: list[int] = []
        for part in text.split(","):
            match = _SPAN.fullmatch(part.strip())
            if match is None:
                raise PlanError("ranks", got=repr(text[:200]), expected="spans like 0-3,8-11", fix="rewrite the span")
            if max(map(len, part.split("-"))) > _MAX_RANK_DIGITS or int(match[2] or match[1]) >= MAX_COUNT:
                raise PlanError("ranks", got=part[:40], expected=f"ranks below {MAX_COUNT}", fix="correct the span")
            first = int(match[1])
            last = int(match[2]) if match[2] else first
            if last < first or (ranks and first <= ranks[-1]):
                raise PlanError(
                    "ranks", got=repr(text), expected="ascending spans that do not overlap", fix="sort the spans"
                )
            ranks.extend(range(first, last + 1))
        return cls(tuple(ranks))

    @classmethod
    def of(cls, ranks: Iterable[int]) -> RankSet:
        return cls(tuple(sorted(set(ranks))))

    def __str__(self) -> str:
        spans: list[list[int]] = []
        for rank in self.ranks:
            if spans and rank == spans[-1][1] + 1:
                spans[-1][1] = rank
            else:
                spans.append([rank, rank])
        return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)

    def __len__(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Share of a GPU's SMs (of a rank's cores on a CPU) that a module may use."""

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PlanError("quota", got=self.share, expected="a share in (0, 1]", fix="omit it for the whole GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """Where and how one module runs. `unit` 0: the schedule decides how many microbatches an action covers."""

    ranks: RankSet
    layout: Layout
    quota: Quota = field(default_factory=Quota)
    unit: int = 0
    recompute: Recompute = Recompute.none
    sequence_parallel: bool = False  # between its layers, tokens are split over the tp ranks (Korthikanti et al. 2022)

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.layout.tp == 1:
            raise PlanError(
                "sequence_parallel", got="true with tp 1", expected="tp above 1: it splits over tp", fix="leave it out"
            )
        if len(self.ranks) != self.layout.num_ranks:
            raise PlanError(
                "ranks",
                got=f"{len(self.ranks)} ranks ({self.ranks})",
                expected=f"{self.layout.num_ranks} ranks for layout {self.layout} (tp x cp x pp x dp)",
                fix=f"change the layout, or list {self.layout.num_ranks} ranks",
            )
        if self.unit < 0:
            raise PlanError("unit", got=self.unit, expected="at least 1", fix="omit it to let the schedule decide")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the planner expected. Ignored by the runtime."""

    step_s: float
    peak_bytes: float
    cost_model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole plan. Legal in itself; `validate_plan` says whether it fits a workload and a cluster."""

    workload: str
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    schedule: str
    modules: Mapping[str, ModulePlan]
    digest: str = ""  # of the workload the plan was made for; empty: not recorded
    predicted: Prediction | None = None

    def __post_init__(self) -> None:
        for key in ("world_size", "global_batch_size", "micro_batch_size"):
            if getattr(self, key) < 1:
                raise PlanError(key, got=getattr(self, key), expected="at least 1", fix=f"set {key}")
        if not self.modules:
            raise PlanError("modules", got="none", expected="at least one module", fix="list the modules")
        for name, module in self.modules.items():
            if module.ranks.ranks[-1] >= self.world_size:
                raise PlanError(
                    f"modules.{name}.ranks",
                    got=f"rank {module.ranks.ranks[-1]} ({module.ranks})",
                    expected=f"ranks below world_size {self.world_size}",
                    fix=f"raise world_size to {module.ranks.ranks[-1] + 1}, or move {name}",
                )

    def modules_on(self, rank: int) -> tuple[str, ...]:
        """Names of the modules that have a lane on this rank, in the plan's order."""
        return tuple(name for name, module in self.modules.items() if rank in module.ranks.ranks)

    @property
    def every_rank_runs_all(self) -> bool:
        """Whether no module leaves a rank out."""
        return all(len(module.ranks.ranks) == self.world_size for module in self.modules.values())

    def num_microbatches(self, backbone: str) -> int:
        """Backbone microbatches per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.modules[backbone].layout.dp)


def validate_plan(plan: Plan, workload: Workload, cluster: Cluster | None = None) -> None:
    """Raise PlanError unless the plan can run this workload (on this cluster).

    Checked: names, digest, batch divisibility, the degrees of every layout against the module's sizes, ranks.
    """
    if plan.workload != workload.name:
        raise PlanError("workload", got=plan.workload, expected=workload.name, fix="use the plan of this workload")
    if plan.digest and plan.digest != workload.digest:
        raise PlanError(
            "digest",
            got=plan.digest,
            expected=f"{workload.digest}, the digest of {workload.name!r} as it is now",
            fix="make the plan again with `mosaic plan`: the model's sizes changed since",
        )
    _validate_names(plan, workload)
    for module in workload.modules:
        _validate_layout(plan.modules[module.name], module)
    if plan.modules[workload.backbone.name].unit > 1:
        raise PlanError(
            f"modules.{workload.backbone.name}.unit",
            got=plan.modules[workload.backbone.name].unit,
            expected="1: units count this module's microbatches",
            fix="omit unit",
        )
    lane_batch = plan.micro_batch_size * plan.modules[workload.backbone.name].layout.dp
    if plan.global_batch_size % lane_batch:
        raise PlanError(
            "global_batch_size",
            got=plan.global_batch_size,
            expected=f"a multiple of micro_batch_size x {workload.backbone.name}.dp = {lane_batch}",
            fix=f"use {max(1, plan.global_batch_size // lane_batch) * lane_batch}",
        )
    if cluster is not None and plan.world_size > cluster.num_ranks:
        raise PlanError(
            "world_size",
            got=plan.world_size,
            expected=f"at most the {cluster.num_ranks} ranks of cluster {cluster.name!r}",
            fix="plan for this cluster",
        )


def _validate_names(plan: Plan, workload: Workload) -> None:
    known = [module.name for module in workload.modules]
    for name in plan.modules:
        if name not in known:
            raise PlanError(
                f"modules.{name}", got=name, expected=f"one of {known}", fix="remove it, or use a script that has it"
            )
    for name in known:
        if name not in plan.modules:
            raise PlanError(
                "modules", got=sorted(plan.modules), expected=f"an entry for {name!r} too", fix=f"add modules.{name}"
            )


def _validate_layout(module_plan: ModulePlan, module: ModuleConfig) -> None:
    layout = module_plan.layout
    if module.num_experts and layout.tp > 1 and not module_plan.sequence_parallel:
        raise PlanError(
            f"modules.{module.name}.sequence_parallel",
            got=f"false with tp {layout.tp} and {module.num_experts} experts",
            expected="true: tp ranks would otherwise route the same tokens",
            fix="set sequence_parallel: true",
        )
    for axis, degree in (("ep", layout.ep), ("etp", layout.etp)):
        if degree > 1 and not module.num_experts:
            raise PlanError(
                f"modules.{module.name}.layout.{axis}",
                got=degree,
                expected="1: the module has no experts",
                fix=f"leave {axis} out",
            )
    tokens_split = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if module_plan.sequence_parallel else 1)
    for axis, degree, what, size in (
        ("tp", layout.tp, "num_heads", module.num_heads),
        ("tp", layout.tp, "num_query_groups", module.query_groups),
        ("tp", layout.tp, "ffn_hidden_size", module.ffn_hidden_size),
        ("tp", layout.tp, "vocab_size", module.vocab_size),
        ("pp", layout.pp * layout.vpp, "num_layers", module.num_layers),
        ("cp", tokens_split, "tokens_per_item", module.tokens_per_item),
        ("ep", layout.ep, "num_experts", module.num_experts),
        ("etp", layout.etp, "ffn_hidden_size", module.ffn_hidden_size),
    ):
        if size % degree:
            raise PlanError(
                f"modules.{module.name}.layout.{axis}",
                got=getattr(layout, axis),
                expected=f"a degree that divides {what} {size}"
                + (" into chunks (2 x cp, x tp with sequence_parallel)" if axis == "cp" else ""),
                fix=f"lower {axis}",
            )
