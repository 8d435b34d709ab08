"""What a run leaves behind: its losses, step by step, and at its end the timeline of its median step and measures."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.telemetry.appended import AppendedLines
from megatron_mosaic.runtime.telemetry.numbers import OwnStep, SharedNumbers
from megatron_mosaic.runtime.telemetry.timelines import alike_ranks, from_the_start, on_wall_clock
from megatron_mosaic.schedules.timeline import Span

LOSSES_FILE = "losses.jsonl"
TIMELINE_FILE = "timeline.json"
MEASURES_FILE = "measures.json"
KEPT_STEPS = 200  # whose spans are in memory for the timeline


class StepReport:
    """Losses (rank 0, written at once) and spans (kept; at the end one rank of each class sends those of one step)."""

    def __init__(self, directory: str, plan: Plan, world: dist.ProcessGroup) -> None:
        self._directory, self._plan, self._world = Path(directory), plan, world
        self._rank = dist.get_rank(world)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._losses = AppendedLines(self._directory / LOSSES_FILE)
        self._steps: deque[list[Span]] = deque(maxlen=KEPT_STEPS)

    def add_losses(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Append one step's losses. Iterations count from 1, over all starts of a run."""
        if self._rank == 0:
            self._losses.append(iteration, losses)

    def add_spans(self, spans: Sequence[Span]) -> None:
        """Keep one step's spans of this rank."""
        self._steps.append(list(spans))

    def write(self, measures: Mapping[str, Mapping[str, float]], group_creation_s: float) -> None:
        """Collective. Rank 0 writes both files.

        `timeline.json`: seconds of the last 200 steps, and the spans of their median, of one rank for all `alike`. The
        first tenth of the steps (at least one, if there are more) is warm-up and is not considered.
        `measures.json`: `measures` of all ranks; for each module the largest value; and `group_creation_s`, of the
        slowest rank.
        """
        if not self._steps:
            return
        measured = self._gather_measures(measures, group_creation_s)
        own_s = [OwnStep.of(spans).seconds for spans in self._steps]
        seconds = SharedNumbers(self._plan, self._world).longest(own_s)
        warm = range(min(len(seconds) - 1, max(1, len(seconds) // 10)), len(seconds))
        median = sorted(warm, key=seconds.__getitem__)[len(warm) // 2]
        spans = self._collect(on_wall_clock(self._steps[median]))
        if self._rank != 0:
            return
        (self._directory / MEASURES_FILE).write_text(json.dumps(measured), encoding="utf-8")
        rows = [[s.rank, s.lane, s.start_s, s.end_s, s.label] for s in from_the_start(spans)]
        alike = {str(rank): str(ranks) for rank, ranks in alike_ranks(self._plan).items()}
        data = {"step": median, "step_s": seconds[median], "seconds": seconds, "spans": rows, "alike": alike}
        (self._directory / TIMELINE_FILE).write_text(json.dumps(data), encoding="utf-8")

    def _gather_measures(
        self, measures: Mapping[str, Mapping[str, float]], group_creation_s: float
    ) -> dict[str, dict[str, float] | float]:
        gathered: list[Any] = [None] * dist.get_world_size(self._world)
        dist.all_gather_object(gathered, (measures, group_creation_s), group=self._world)
        largest: dict[str, dict[str, float]] = {}
        for one, _ in gathered:
            for key, by_module in one.items():
                into = largest.setdefault(key, {})
                for module, value in by_module.items():
                    into[module] = max(into.get(module, 0), value)
        return {**largest, "group_creation_s": max(seconds for _, seconds in gathered)}

    def _collect(self, own: list[Span]) -> list[Span]:
        """The spans of all representatives, on rank 0: as many messages as there are classes of ranks."""
        found: list[Span] = []
        for rank in sorted(alike_ranks(self._plan)):
            said: list[Any] = [own]
            if self._rank == 0 and rank != 0:
                dist.recv_object_list(said, src=rank, group=self._world)
            elif self._rank == rank != 0:
                dist.send_object_list(said, dst=0, group=self._world)
            if self._rank == 0:
                found += said[0]
        return found
