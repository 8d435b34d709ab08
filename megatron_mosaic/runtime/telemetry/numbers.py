"""Sums and largest values that all ranks find together: as many numbers as there are lanes, modules and steps.

 own spans --OwnStep--> [lanes + modules] --3 all-reduces--> Shared: mean and worst of each lane, step by step seconds

No rank sees another's spans: the cost does not grow with the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.parallel_state_ext.rebound.cpu import device
from megatron_mosaic.plan import Plan
from megatron_mosaic.schedules.rank_classes import rank_classes
from megatron_mosaic.schedules.timeline import Span, Timeline

BUSY, BUBBLE, SENT, IMBALANCE = "busy_frac", "bubble_frac", "boundary_bytes", "imbalance"


TAIL = ("~data", "~grads", "~optimizer")  # lanes of every rank


def lanes_of(plan: Plan) -> tuple[str, ...]:
    """Lanes of all modules."""
    return tuple(dict.fromkeys(lane for alike in rank_classes(plan) for lane in alike.lanes))


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStep:
    """One step of this rank. `seconds` from its first span to the end of its last, `busy_s` of them with a span."""

    spans: tuple[Span, ...]
    seconds: float
    busy_s: float
    lane_s: Mapping[str, float]

    @classmethod
    def of(cls, spans: Sequence[Span]) -> OwnStep:
        begin_s = min(span.start_s for span in spans)
        moved = [Span(s.rank, s.lane, s.start_s - begin_s, s.end_s - begin_s, s.label) for s in spans]
        timeline = Timeline(tuple(sorted(moved)))
        (busy_s,) = timeline.busy_s_by_rank().values()
        return cls(spans=tuple(spans), seconds=timeline.end_s, busy_s=busy_s, lane_s=timeline.seconds_by_lane())


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSeconds:
    """Of a step, over the ranks of a lane."""

    mean_s: float
    worst_s: float
    worst_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What every rank knows after they have agreed. `step_s`: of each step, the longest that a rank took.

    `by_module`: name of a number -> module -> its value, per step and mean over ranks; `boundary_bytes` are summed.
    """

    step_s: tuple[float, ...]
    lanes: Mapping[str, LaneSeconds]
    by_module: Mapping[str, Mapping[str, float]]

    @property
    def mean_step_s(self) -> float:
        return sum(self.step_s) / len(self.step_s)


class SharedNumbers:
    """Lanes and modules of a plan, in an order that all ranks share. `agree` is collective over `world`."""

    def __init__(self, plan: Plan, world: dist.ProcessGroup) -> None:
        self._lanes, self._world = (*lanes_of(plan), *TAIL), world
        self._modules = tuple(plan.modules)

    def agree(
        self, steps: Sequence[OwnStep], sent_bytes: Mapping[str, float], imbalance: Mapping[str, float]
    ) -> Shared:
        """Collective. Every rank has as many steps. `sent_bytes`: in all of them, by module that they left."""
        num_steps = len(steps)
        busy = [sum(step.lane_s.get(lane, 0.0) for step in steps) / num_steps for lane in self._lanes]
        runs = [float(any(lane in step.lane_s for step in steps)) for lane in self._lanes]
        sums = self._reduce([*busy, *runs, *self._module_numbers(steps, sent_bytes, imbalance)], dist.ReduceOp.SUM)
        longest = self._reduce([*busy, *(step.seconds for step in steps)], dist.ReduceOp.MAX)
        worst_s, step_s = longest[: len(busy)], longest[len(busy) :]
        world_size, rank = dist.get_world_size(self._world), dist.get_rank(self._world)
        claims = [float(rank if runs[i] and busy[i] == worst_s[i] else world_size) for i in range(len(busy))]
        worst_rank = self._reduce(claims, dist.ReduceOp.MIN)
        num = len(self._lanes)
        lanes = {
            lane: LaneSeconds(mean_s=sums[i] / sums[num + i], worst_s=worst_s[i], worst_rank=int(worst_rank[i]))
            for i, lane in enumerate(self._lanes)
            if sums[num + i]
        }
        return Shared(step_s=tuple(step_s), lanes=lanes, by_module=self._by_module(sums[2 * num :], num_steps))

    def _module_numbers(
        self, steps: Sequence[OwnStep], sent_bytes: Mapping[str, float], imbalance: Mapping[str, float]
    ) -> list[float]:
        """Per module: ranks, busy and idle share of these, bytes sent, imbalance and ranks that know one."""
        found: list[float] = []
        num_steps, seconds = len(steps), sum(step.seconds for step in steps)
        idle_frac = 1 - sum(step.busy_s for step in steps) / seconds if seconds else 0.0
        for module in self._modules:
            own_s = [
                lane_s for step in steps for lane, lane_s in step.lane_s.items() if lane.partition(".")[0] == module
            ]
            here = float(bool(own_s))
            busy_frac = sum(own_s) / seconds if seconds else 0.0
            uneven = imbalance.get(module, math.nan) if here else math.nan
            known = float(not math.isnan(uneven))
            found += [here, busy_frac, here * idle_frac, sent_bytes.get(module, 0.0) / num_steps]
            found += [uneven if known else 0.0, known]
        return found

    def _by_module(self, sums: Sequence[float], num_steps: int) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {BUSY: {}, BUBBLE: {}, SENT: {}, IMBALANCE: {}}
        for i, module in enumerate(self._modules):
            ranks, busy, idle, sent, uneven, known = sums[6 * i : 6 * i + 6]
            if ranks:
                found[BUSY][module], found[BUBBLE][module] = busy / ranks, idle / ranks
                found[SENT][module] = sent
            if known:
                found[IMBALANCE][module] = uneven / known
        return found

    def longest(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """Collective. Of each step, the longest that a rank took."""
        return tuple(self._reduce(seconds, dist.ReduceOp.MAX))

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        row = torch.tensor(list(values), dtype=torch.float64, device=device())
        dist.all_reduce(row, op=operation, group=self._world)
        found: list[float] = row.tolist()
        return found
