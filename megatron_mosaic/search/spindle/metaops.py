"""MetaOps: chains of alike layers of one module for one task, in levels, each with the curve of its speed.

Spindle, section 3.1: operators merge where an edge is the only one on both sides and type and input are alike; the
layers of a module for one task are such a chain. A level is what has the same distance from the inputs.
Ends (embedding, projector, loss) are counted to the layers evenly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.waves.slices import TaskUse, slice_work
from megatron_mosaic.plan import Layout, RankSet, Recompute


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one layer, forward and backward, on so many devices: the numbers that are valid and worth having."""

    counts: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]  # strictly descending

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Curve:
        """Without the points that are no faster than one of fewer devices."""
        kept: list[tuple[int, float]] = []
        for count, seconds in sorted(points.items()):
            if not kept or seconds < kept[-1][1]:
                kept.append((count, seconds))
        return cls(tuple(count for count, _ in kept), tuple(seconds for _, seconds in kept))

    def at(self, count: int) -> float:
        """Seconds on a valid number of devices."""
        return self.seconds[self.counts.index(count)]

    def most_within(self, count: int) -> int:
        """The largest valid number up to this one; 0 where there is none."""
        i = bisect_right(self.counts, count)
        return self.counts[i - 1] if i else 0

    def devices(self, seconds: float) -> float:
        """The real number of devices on which a layer takes so long (Spindle, equation 11: between two valid numbers on
        a line); above the slowest time the fewest devices, for a part of the time. Infinite below the fastest."""
        if seconds < self.seconds[-1]:
            return float("inf")
        if seconds >= self.seconds[0]:
            return self.counts[0] * self.seconds[0] / seconds
        for (fewer, slow), (more, fast) in pairwise(zip(self.counts, self.seconds)):
            if seconds >= fast:
                return ((seconds - fast) * fewer + (slow - seconds) * more) / (slow - fast)
        raise AssertionError("a time between the slowest and the fastest lies between two points")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaOp:
    """All layers of a module for one task."""

    task: str
    module: str
    level: int
    num_layers: int
    tp: int
    curve: Curve

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.module

    def seconds(self, count: int) -> float:
        """Of all layers on so many devices."""
        return self.num_layers * self.curve.at(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is decided before anything is scheduled: the tp of every module, what backward computes again."""

    tp: Mapping[str, int]
    recompute: Recompute


def contract(
    model: CostModel, uses: Mapping[tuple[str, str], TaskUse], choice: Choice, memory_bytes: float
) -> tuple[MetaOp, ...] | None:
    """MetaOps of all tasks. None where one of them fits on no number of devices."""
    found = []
    for (task, module), use in uses.items():
        curve = measure_curve(model, use, choice.tp[module], choice.recompute, memory_bytes)
        if not curve.counts:
            return None
        level = use.task.levels()[module]
        layers = use.module.num_layers
        op = MetaOp(task=task, module=module, level=level, num_layers=layers, tp=choice.tp[module], curve=curve)
        found.append(op)
    return tuple(found)


def measure_curve(model: CostModel, use: TaskUse, tp: int, recompute: Recompute, memory_bytes: float) -> Curve:
    """From the cost model: dp divides the task's samples, and what a rank keeps of its samples fits into it."""
    points, per_node = {}, model.cluster.gpus_per_node
    for count in range(tp, model.cluster.num_ranks + 1, tp):
        dp = count // tp
        if use.task.samples % dp:
            continue
        work = slice_work(
            use,
            Layout(tp=tp, dp=dp),
            RankSet.block(0, count),
            per_node,
            num_layers=use.module.num_layers,
            is_first=True,
            is_last=True,
            recompute=recompute,
        )
        cost = model.stage_cost(work)
        if cost.memory.unit_bytes <= memory_bytes:
            points[count] = cost.busy_s / use.module.num_layers
    return Curve.of(points)


def by_level(ops: Sequence[MetaOp]) -> list[tuple[MetaOp, ...]]:
    """MetaOps of each level, from the inputs on."""
    return [tuple(op for op in ops if op.level == level) for level in sorted({op.level for op in ops})]
