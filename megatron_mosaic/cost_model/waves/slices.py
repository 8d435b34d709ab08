"""The work of slices: of layers of a module for one task, and of parameters that several slices share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.groups import stage_groups
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout, RankSet, Recompute
from megatron_mosaic.plan.tasks.task import LossKind, TaskConfig
from megatron_mosaic.plan.tasks.waves import Slice
from megatron_mosaic.plan.workload import ModuleConfig, Workload
from megatron_mosaic.schedules import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUse:
    """A module in a task: with the task's items, without what the task does not use, and how far gradients go in it.
    For its work, not its parameters."""

    task: TaskConfig
    module: ModuleConfig
    kinds: tuple[Kind, ...]
    reaches_layers: bool

    @property
    def items(self) -> float:
        """Of a step, in the mean."""
        return self.task.samples * self.module.items_per_sample


def list_uses(workload: Workload) -> dict[tuple[str, str], TaskUse]:
    """(task, module) -> its use. ConfigError for what waves have no price for."""
    found = {}
    for task in workload.tasks:
        with_backward: set[str] = set()
        for used in task.modules:  # in topological order
            module = used.of(workload.by_name[used.name])
            _require_dense(module)
            if task.loss.kind is not LossKind.next_token or used.name not in task.loss.modules:
                module = replace(module, vocab_size=0)  # no logits of it; its embedding is a look-up
            behind = any(b == used.name and a in with_backward for a, b in task.edges)
            if behind or module.is_trained:
                with_backward.add(used.name)
            found[task.name, used.name] = TaskUse(
                task=task,
                module=module,
                kinds=(Kind.F, Kind.B) if used.name in with_backward else (Kind.F,),
                reaches_layers=behind or not module.frozen,
            )
    return found


def _require_dense(module: ModuleConfig) -> None:
    if module.num_experts or module.num_mtp_layers:
        raise ConfigError(
            f"module {module.name!r}",
            got="experts, or layers of multi-token prediction",
            expected="a plain stack of layers: plans in waves have no price for others",
            fix="use a model of one flow",
        )


def slice_work(
    use: TaskUse,
    layout: Layout,
    ranks: RankSet,
    gpus_per_node: int,
    *,
    num_layers: int,
    is_first: bool,
    is_last: bool,
    recompute: Recompute,
) -> StageWork:
    """So many layers of a module, and its ends, for all samples that the task has in a step: one unit."""
    return StageWork(
        module=use.module,
        layout=layout,
        dense_layers=num_layers,
        expert_layers=0,
        first=is_first,
        last=is_last,
        items=math.ceil(use.items / layout.dp - 1e-9),
        num_units=1,
        kinds=use.kinds,
        reaches_layers=use.reaches_layers,
        recompute=recompute,
        sequence_parallel=False,
        share=1.0,
        groups=stage_groups(ranks, layout, gpus_per_node),
    )


def work_of(each: Slice, use: TaskUse, gpus_per_node: int) -> StageWork:
    """The work of a plan's slice."""
    return slice_work(
        use,
        each.layout,
        each.ranks,
        gpus_per_node,
        num_layers=each.num_layers,
        is_first=each.first_layer == 0,
        is_last=each.end_layer == use.module.num_layers,
        recompute=each.recompute,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Layers of a module that the same ranks hold: its gradients are summed over them, its optimizer is split so."""

    module: str
    layers: tuple[int, ...]
    ranks: RankSet
    work: StageWork


def list_pools(slices: Iterable[Slice], workload: Workload, gpus_per_node: int) -> tuple[Pool, ...]:
    """By module, its layers in groups that stand on the same ranks, over all waves and tasks."""
    holders: dict[tuple[str, int], set[int]] = defaultdict(set)
    tp: dict[str, int] = {}
    for each in slices:
        tp[each.module] = each.layout.tp
        for layer in range(each.first_layer, each.end_layer):
            holders[each.module, layer].update(each.ranks)
    alike: dict[tuple[str, RankSet], list[int]] = defaultdict(list)
    for (name, layer), ranks in holders.items():
        alike[name, RankSet.of(ranks)].append(layer)
    return tuple(
        Pool(
            module=name,
            layers=tuple(sorted(layers)),
            ranks=ranks,
            work=_pool_work(workload.by_name[name], layers, ranks, tp[name], gpus_per_node),
        )
        for (name, ranks), layers in alike.items()
    )


def _pool_work(module: ModuleConfig, layers: list[int], ranks: RankSet, tp: int, gpus_per_node: int) -> StageWork:
    """For its parameters alone: it has no items."""
    layout = Layout(tp=tp, dp=len(ranks) // tp)
    return StageWork(
        module=module,
        layout=layout,
        dense_layers=len(layers),
        expert_layers=0,
        first=0 in layers,
        last=module.num_layers - 1 in layers,
        items=0,
        num_units=1,
        kinds=(Kind.F, Kind.B),
        reaches_layers=not module.frozen,
        recompute=Recompute.none,
        sequence_parallel=False,
        share=1.0,
        groups=stage_groups(ranks, layout, gpus_per_node),
    )
