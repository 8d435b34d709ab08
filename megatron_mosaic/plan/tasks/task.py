"""Tasks of a workload: each with its samples of a step, the modules and edges that it uses, and its loss.

             image --+-- contrastive (task image_text)           modules are shared: their parameters are one,
text --------+       |                                           their gradients are sums over all tasks
             image --+--> llm -- next_token (task caption)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.tasks.histogram import NO_HISTOGRAM

if TYPE_CHECKING:
    from megatron_mosaic.plan.workload import Edge, ModuleConfig


class LossKind(StrEnum):
    """What is minimised."""

    contrastive = "contrastive"  # of two modules' rows: each sample's pair against all others of the task's step
    next_token = "next_token"  # cross-entropy of a module's logits
    regression = "regression"  # squared error of a module's output rows


_NUM_MODULES = {LossKind.contrastive: 2, LossKind.next_token: 1, LossKind.regression: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLoss:
    """The loss of a task and the modules whose rows it is made of."""

    kind: LossKind
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskModule:
    """A module as one task uses it. 0: as the module says."""

    name: str
    items_per_sample: float = 0.0
    tokens_per_item: int = 0

    def of(self, module: ModuleConfig) -> ModuleConfig:
        """The module with this task's items. A number of its own takes the place of a histogram."""
        return replace(
            module,
            items_per_sample=self.items_per_sample or module.items_per_sample,
            tokens_per_item=self.tokens_per_item or module.tokens_per_item,
            items_histogram=NO_HISTOGRAM if self.items_per_sample else module.items_histogram,
            tokens_histogram=NO_HISTOGRAM if self.tokens_per_item else module.tokens_histogram,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """One task. `samples`: of its own, in every step; `edges`: (source, target) of those that its samples take."""

    name: str
    samples: int
    modules: tuple[TaskModule, ...]
    edges: tuple[tuple[str, str], ...]
    loss: TaskLoss

    @property
    def module_names(self) -> tuple[str, ...]:
        return tuple(used.name for used in self.modules)

    @property
    def as_digest(self) -> dict[str, Any]:
        """What plans depend on: no statistics."""
        return {
            "name": self.name,
            "modules": [[used.name, used.tokens_per_item] for used in self.modules],
            "edges": sorted(self.edges),
            "loss": [self.loss.kind.value, *self.loss.modules],
        }

    def levels(self) -> dict[str, int]:
        """Module -> edges on the longest way to it."""
        found: dict[str, int] = {}
        for name in self.module_names:  # in the workload's order, which is topological
            found[name] = max((found[a] + 1 for a, b in self.edges if b == name), default=0)
        return found


def scale_tasks(tasks: Sequence[TaskConfig], since: int, to: int) -> tuple[TaskConfig, ...]:
    """The tasks of a step of `since` samples for one of `to`. ConfigError where a task's do not come out whole."""
    for task in tasks:
        if task.samples * to % since:
            raise ConfigError(
                f"task {task.name!r}: samples",
                got=f"{task.samples} of {since} samples, {task.samples * to / since:g} of {to}",
                expected="a whole number of samples of every step",
                fix=f"use a global_batch_size that is a multiple of {since}, or other samples",
            )
    return tuple(replace(task, samples=task.samples * to // since) for task in tasks)


def validate_tasks(
    where: str, tasks: Sequence[TaskConfig], by_name: Mapping[str, ModuleConfig], edges: Sequence[Edge], batch: int
) -> None:
    """Raise ConfigError unless the tasks share out the batch, the modules and the edges, each with a loss."""
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ConfigError(f"{where}: tasks", got=names, expected="unique names", fix="rename one")
    pairs = {(edge.source, edge.target) for edge in edges}
    for task in tasks:
        _validate_task(f"{where}: task {task.name!r}", task, by_name, pairs)
    if (total := sum(task.samples for task in tasks)) != batch:
        raise ConfigError(
            f"{where}: tasks",
            got=f"{total} samples ({', '.join(f'{task.name} {task.samples}' for task in tasks)})",
            expected=f"{batch}, the global_batch_size",
            fix="change samples of a task, or global_batch_size",
        )
    _require_used("module", by_name, [name for task in tasks for name in task.module_names], where)
    taken = [pair for task in tasks for pair in task.edges]
    _require_used("edge", map("->".join, sorted(pairs)), map("->".join, taken), where)


def _require_used(what: str, all_of_them: Iterable[str], used: Iterable[str], where: str) -> None:
    found = set(used)
    for name in all_of_them:
        if name not in found:
            raise ConfigError(
                f"{where}: {what} {name}",
                got="a part of no task",
                expected=f"every {what} in at least one task",
                fix="name it in a task, or remove it",
            )


def _validate_task(
    where: str, task: TaskConfig, by_name: Mapping[str, ModuleConfig], pairs: set[tuple[str, str]]
) -> None:
    used = task.module_names
    if task.samples < 1:
        raise ConfigError(f"{where}: samples", got=task.samples, expected="at least 1", fix="raise it")
    if not used or [name for name in by_name if name in used] != list(used):
        raise ConfigError(
            f"{where}: modules",
            got=list(used),
            expected=f"some of {list(by_name)}, each once, in this order",
            fix="correct the names or their order",
        )
    for each in task.modules:
        each.of(by_name[each.name])  # refuses items that the module cannot have
    for source, target in task.edges:
        if (source, target) not in pairs or source not in used or target not in used:
            raise ConfigError(
                f"{where}: edges",
                got=f"{source}->{target}",
                expected=f"edges of the model between {list(used)}",
                fix="name an edge of the model whose ends the task uses",
            )
    _validate_loss(where, task, by_name)


def _validate_loss(where: str, task: TaskConfig, by_name: Mapping[str, ModuleConfig]) -> None:
    loss, feeds = task.loss, {source for source, _ in task.edges}
    ends = [name for name in task.module_names if name not in feeds]
    if sorted(loss.modules) != sorted(ends) or len(loss.modules) != _NUM_MODULES[loss.kind]:
        raise ConfigError(
            f"{where}: loss.modules",
            got=list(loss.modules),
            expected=f"the modules that feed no other ({ends}), and for {loss.kind} {_NUM_MODULES[loss.kind]} of them",
            fix="name them, or change the task's edges",
        )
    needed = "vocab_size" if loss.kind is LossKind.next_token else "output_size"
    sizes = {name: getattr(by_name[name], needed) for name in loss.modules}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ConfigError(
            f"{where}: loss",
            got=f"{needed} {sizes}",
            expected=f"{needed} above 0" + (", the same on both" if len(sizes) == 2 else f" for {loss.kind}"),
            fix=f"set {needed}, or choose another loss",
        )
