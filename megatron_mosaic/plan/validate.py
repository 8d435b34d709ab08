"""Whether a plan can run a workload, on a cluster: names, degrees against sizes, the batch; and what can run plans.

`Limits` is the one table of what cannot be run yet: the search asks it for its space, a stock script and Megatron's
arguments for what to refuse. Whoever lifts a limit changes it here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan.cluster import Cluster, GpuClusterSection, LocalClusterSection
from megatron_mosaic.plan.layout import ModulePlan, Recompute
from megatron_mosaic.plan.plan import NESTING, Plan
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Workload

MAX_ACTIONS = 2**18  # of a step: what holds a schedule of more, its text or its timeline fills a machine's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one way of running plans can do. Layouts are no limit: every one that fits a workload runs."""

    formats: frozenset[Format]
    shardings: frozenset[Sharding] = frozenset({Sharding.none, Sharding.optimizer})
    shares_of_gpus: bool = False  # modules beside each other on one GPU; a CPU rank's share is its number of threads


@dataclass(frozen=True, slots=True, kw_only=True)
class StockLimits(Limits):
    """Of a script whose one model Megatron lays out itself."""

    schedules: frozenset[str] = frozenset({"1f1b", "interleaved"})  # the second with virtual stages
    recompute: frozenset[Recompute] = frozenset({Recompute.none, Recompute.selective, Recompute.full})
    max_unit: int = 1


RUNTIME = Limits(formats=frozenset(Format) - {Format.fp16})
STOCK_SCRIPT = StockLimits(formats=frozenset(Format))


def require_trainable(training: TrainingSetup, limits: Limits) -> None:
    """Raise PlanError unless this format and sharding can be run."""
    if training.format not in limits.formats:
        raise PlanError(
            "training.format",
            got=training.format,
            expected=f"one of {[each.value for each in Format if each in limits.formats]}: fp16 needs a loss scale, on "
            "which the optimizers of several modules do not agree yet",
            fix="set format: bf16",
        )
    if training.sharding not in limits.shardings:
        raise PlanError(
            "training.sharding",
            got=training.sharding,
            expected=f"one of {[each.value for each in Sharding if each in limits.shardings]}: the runtime has no "
            "FSDP, which would have to gather the parameters of several modules in turn",
            fix="set sharding: optimizer",
        )


def require_stock(plan: Plan, world_size: int, limits: StockLimits = STOCK_SCRIPT) -> tuple[str, ModulePlan]:
    """The plan's one module and its name. PlanError unless Megatron can lay it out as the plan says."""
    if len(plan.modules) != 1:
        raise PlanError(
            "modules",
            got=list(plan.modules),
            expected="one module: this script has one model and no ModelDefinition",
            fix="plan for one module, or write the script like scripts/pretrain_any2any.py",
        )
    ((name, module),) = plan.modules.items()
    if module.ranks.ranks != tuple(range(world_size)) or plan.world_size != world_size:
        raise PlanError(
            f"modules.{name}.ranks",
            got=f"{module.ranks} of world_size {plan.world_size}",
            expected=f"0-{world_size - 1}: a stock script runs on every process",
            fix=f"start {len(module.ranks)} processes, or place the module on all ranks",
        )
    wrong_schedule = plan.schedule.name not in limits.schedules or plan.schedule.parameters
    if wrong_schedule or (plan.schedule.name == "interleaved") != (module.layout.vpp > 1):
        raise PlanError(
            "schedule",
            got=f"{plan.schedule}, vpp {module.layout.vpp}",
            expected="1f1b, or interleaved with virtual stages (vpp above 1)",
            fix="set schedule: 1f1b and vpp: 1",
        )
    if module.quota.share != 1 or module.unit > limits.max_unit or module.recompute not in limits.recompute:
        raise PlanError(
            f"modules.{name}",
            got=f"quota {module.quota.share}, unit {module.unit or 1}, recompute {module.recompute}",
            expected=f"no quota, unit {limits.max_unit}, recompute "
            f"{' or '.join(each.value for each in Recompute if each in limits.recompute)}: a stock script follows "
            "nothing else",
            fix="remove what it cannot follow",
        )
    return name, module


def validate_plan(
    plan: Plan, workload: Workload, cluster: Cluster | GpuClusterSection | LocalClusterSection | None = None
) -> None:
    """Raise PlanError unless the plan can run this workload (on this cluster).

    Checked: names, digest, batch divisibility, the degrees of every layout against the module's sizes, actions, ranks.
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
    backbone = plan.modules[workload.backbone.name].layout
    if backbone.vpp > 1 and backbone.pp == 1:
        raise PlanError(
            f"modules.{workload.backbone.name}.layout.vpp",
            got=backbone.vpp,
            expected="1 with pp 1: layer ranges of one rank fill bubbles of the backbone, which has none then",
            fix="set vpp: 1, or raise pp",
        )
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
    if (num_actions := count_actions(plan, workload.backbone.name)) > MAX_ACTIONS:
        raise PlanError(
            "global_batch_size",
            got=f"{num_actions} actions in a step",
            expected=f"at most {MAX_ACTIONS}",
            fix=f"lower it, or raise micro_batch_size, {workload.backbone.name}.dp or a unit",
        )
    if cluster is not None and plan.world_size > cluster.num_ranks:
        raise PlanError(
            "world_size",
            got=plan.world_size,
            expected=f"at most the {cluster.num_ranks} ranks of cluster {cluster.name!r}",
            fix="raise cluster.num_nodes (of cluster=local: cluster.num_ranks), or plan for this cluster",
        )


def list_empty_replicas(plan: Plan, workload: Workload) -> tuple[str, ...]:
    """A sentence for each module whose unit, where the plan or a nesting schedule sets it, brings fewer items than it
    has replicas, at the mean: some compute nothing."""
    backbone = workload.backbone.name
    if {*plan.modules} != {*workload.by_name}:
        return ()  # `validate_plan` has more to say
    samples = plan.micro_batch_size * plan.modules[backbone].layout.dp
    found = []
    for module in workload.modules:
        placed, unit = plan.modules[module.name], plan.units(backbone)[module.name]
        items = samples * module.items_per_sample
        is_set = placed.unit or plan.schedule.name in NESTING
        if module.name != backbone and is_set and unit * items < placed.layout.dp - 1e-9:
            found.append(
                f"modules.{module.name}.unit: {unit} microbatches bring {unit * items:.3g} items on average to "
                f"{placed.layout.dp} replicas, so some of them compute nothing: "
                f"set unit: {math.ceil(placed.layout.dp / items - 1e-9)}, or lower dp"
            )
    return tuple(found)


def count_actions(plan: Plan, backbone: str) -> int:
    """Forwards and backwards of all pipeline stages in one step."""
    microbatches = plan.num_microbatches(backbone)
    return sum(
        2 * placed.layout.pp * placed.layout.vpp * -(-microbatches // (placed.unit or 1))
        for placed in plan.modules.values()
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
