"""A plan in waves: which layers of which task's module run where, wave by wave; backward goes the other way.

    wave 0   ranks 0-3 caption: vision 0-7     ranks 4-5 pairs: vision 0-3    ranks 6-7 pairs: text 0-11
    wave 1   ranks 0-3 caption: vision 8-11    ranks 4-7 pairs: vision 4-11   <- an instance on other ranks

Spindle (arXiv 2409.03365, section 3): slices of one wave have ranks of their own. A module may stand on several sets of
ranks: its parameters are one, the sum of its gradients is over all ranks that ran it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan.layout import Layout, RankSet, Recompute
from megatron_mosaic.plan.plan import Prediction
from megatron_mosaic.plan.tasks.task import TaskConfig
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Consecutive layers of a module, for all samples of a task in a step, on ranks in a layout of tp and dp."""

    task: str
    module: str
    first_layer: int
    num_layers: int
    ranks: RankSet
    layout: Layout
    recompute: Recompute = Recompute.none

    def __post_init__(self) -> None:
        if self.first_layer < 0 or self.num_layers < 1:
            raise PlanError(
                f"{self.name}: layers",
                got=f"{self.num_layers} from {self.first_layer}",
                expected="one or more, counted from 0",
                fix="correct the layers",
            )
        if len(self.ranks) != self.layout.num_ranks or self.layout.tp * self.layout.dp != self.layout.num_ranks:
            raise PlanError(
                f"{self.name}: layout",
                got=f"{self.layout} on {len(self.ranks)} ranks ({self.ranks})",
                expected="tp x dp ranks, and no other axis",
                fix="change the layout or the ranks",
            )
        if any(end % self.layout.tp for span in self.ranks.spans for end in span):
            raise PlanError(
                f"{self.name}: ranks",
                got=str(self.ranks),
                expected=f"whole groups of tp {self.layout.tp} ranks, from a multiple of it: instances of a module "
                "share its parts so",
                fix="move the ranks",
            )

    @property
    def name(self) -> str:
        return f"{self.task}: {self.module} {self.first_layer}-{self.end_layer - 1}"

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers


type Waves = tuple[tuple[Slice, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WavePlan:
    """Slices by wave, in the order of the forward. `validate_waves` says whether it fits a workload."""

    workload: str
    world_size: int
    global_batch_size: int
    waves: Waves
    digest: str = ""
    cluster: str | FrozenMap[str, Any] = ""
    training: TrainingSetup | None = None
    predicted: Prediction | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for number, wave in enumerate(self.waves):
            used: set[int] = set()
            for each in wave:
                if each.ranks.last >= self.world_size or not used.isdisjoint(each.ranks):
                    raise PlanError(
                        f"wave {number}, {each.name}: ranks",
                        got=str(each.ranks),
                        expected=f"ranks below world_size {self.world_size}, of no other slice of the wave",
                        fix="move it, or give it a wave of its own",
                    )
                used.update(each.ranks)

    @property
    def slices(self) -> Iterator[Slice]:
        """All of them, in the order of the forward."""
        return (each for wave in self.waves for each in wave)

    def instances(self, module: str) -> tuple[RankSet, ...]:
        """The sets of ranks that a module stands on, by first use."""
        return tuple(dict.fromkeys(each.ranks for each in self.slices if each.module == module))


def validate_waves(plan: WavePlan, workload: Workload) -> None:
    """Raise PlanError unless every task's modules run once, layer after layer, behind what feeds them."""
    if plan.workload != workload.name or plan.digest not in ("", workload.digest):
        raise PlanError(
            "workload",
            got=f"{plan.workload} {plan.digest}",
            expected=f"{workload.name} {workload.digest}",
            fix="make the plan again with `mosaic plan`",
        )
    if plan.global_batch_size != workload.global_batch_size:
        raise PlanError(
            "global_batch_size",
            got=plan.global_batch_size,
            expected=f"{workload.global_batch_size}, which the tasks share out",
            fix="make the plan again with this batch",
        )
    tasks = {task.name: task for task in workload.tasks}
    ended: dict[tuple[str, str], tuple[int, int]] = {}  # layers that are done, last wave
    for number, wave in enumerate(plan.waves):
        for each in wave:
            where = f"wave {number}, {each.name}"
            task = tasks.get(each.task)
            if task is None or each.module not in task.module_names:
                raise PlanError(where, got="no such module of a task", expected=f"of {list(tasks)}", fix="correct it")
            _validate_slice(where, each, task, workload.by_name[each.module])
            _require_order(where, each, number, task, ended, workload)
            ended[each.task, each.module] = each.end_layer, number
    for task in workload.tasks:
        for name in task.module_names:
            done, _ = ended.get((task.name, name), (0, 0))
            if done != workload.by_name[name].num_layers:
                raise PlanError(
                    f"task {task.name}: {name}",
                    got=f"{done} layers in all waves",
                    expected=f"all {workload.by_name[name].num_layers}",
                    fix="add the layers that are missing",
                )
    _require_one_tp(plan)


def _require_order(
    where: str,
    each: Slice,
    number: int,
    task: TaskConfig,
    ended: dict[tuple[str, str], tuple[int, int]],
    workload: Workload,
) -> None:
    done, wave = ended.get((each.task, each.module), (0, -1))
    late = [a for a, b in task.edges if b == each.module and not _is_whole(task.name, a, number, ended, workload)]
    if each.first_layer != done or wave == number or late:
        raise PlanError(
            where,
            got=f"{done} layers done before" + (f", {', '.join(late)} not yet" if late else ""),
            expected="the next layers of the module, in a later wave than those before and than what feeds it",
            fix="move the slice",
        )


def _is_whole(
    task: str, module: str, number: int, ended: dict[tuple[str, str], tuple[int, int]], workload: Workload
) -> bool:
    done, wave = ended.get((task, module), (0, number))
    return done == workload.by_name[module].num_layers and wave < number


def _validate_slice(where: str, each: Slice, task: TaskConfig, module: ModuleConfig) -> None:
    layout = each.layout
    for axis, degree, what, size in (
        ("dp", layout.dp, f"the {task.samples} samples of the task", task.samples),
        ("tp", layout.tp, "num_heads", module.num_heads),
        ("tp", layout.tp, "num_query_groups", module.query_groups),
        ("tp", layout.tp, "ffn_hidden_size", module.ffn_hidden_size),
        ("tp", layout.tp, "vocab_size", module.vocab_size),
    ):
        if size % degree:
            raise PlanError(
                f"{where}: layout.{axis}", got=degree, expected=f"a degree that divides {what} ({size})", fix="lower it"
            )


def _require_one_tp(plan: WavePlan) -> None:
    """Instances hold the same parts of a module."""
    found: dict[str, int] = {}
    for each in plan.slices:
        if found.setdefault(each.module, each.layout.tp) != each.layout.tp:
            raise PlanError(
                f"{each.name}: layout.tp",
                got=each.layout.tp,
                expected=f"{found[each.module]}, as the other instances of {each.module}",
                fix="give all instances of a module one tp",
            )
