"""Every so many steps: what lanes and modules took, as a line, as scalars, and as a step's timelines.

rank 0     the line, and scalars.jsonl      the last rank   Megatron's TensorBoard writer, where it has one
the representative of each class of ranks   its timeline of the interval's median step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.telemetry.appended import AppendedLines
from megatron_mosaic.runtime.telemetry.numbers import OwnStep, SharedNumbers
from megatron_mosaic.runtime.telemetry.prediction import Prediction
from megatron_mosaic.runtime.telemetry.scalars import Writer, describe, name_scalars, write_scalars
from megatron_mosaic.runtime.telemetry.timelines import TimelineWriter, is_representative
from megatron_mosaic.schedules.timeline import Span

SCALARS_FILE = "scalars.jsonl"


class PeriodicReport:
    """Collective: every rank adds each of its steps, and reports the rest at the end.

    `_begun_at`: the first step of this start, warm-up that no report counts; `_last`: the last one so far. `_steps`:
    those since the last report; `_sent_before`, `_sent`: bytes by module before them, now; `_imbalance`: as last said.
    """

    def __init__(
        self,
        plan: Plan,
        world: dist.ProcessGroup,
        *,
        interval: int,
        directory: Path | None,
        predicted: Prediction | None,
        writer: Callable[[], Writer | None],
    ) -> None:
        """`directory`: where scalars.jsonl and the timelines go, if anywhere. `writer`: asked for when there is
        something to write; None on ranks that have none."""
        rank = dist.get_rank(world)
        self._interval, self._predicted, self._writer = interval, predicted, writer
        self._numbers, self._speaks = SharedNumbers(plan, world), rank == 0
        self._lines = AppendedLines(directory / SCALARS_FILE) if directory and self._speaks else None
        draws = directory is not None and is_representative(plan, rank)
        self._timelines = TimelineWriter(directory, plan, rank) if directory and draws else None
        self._begun_at = self._last = 0
        self._steps: list[OwnStep] = []
        self._sent: Mapping[str, float] = {}
        self._sent_before: Mapping[str, float] = {}
        self._imbalance: Mapping[str, float] = {}

    def add(
        self, iteration: int, spans: Sequence[Span], sent_bytes: Mapping[str, float], imbalance: Mapping[str, float]
    ) -> None:
        """One step. `sent_bytes`: by module that they left, since the start; `imbalance`: mean of busiest over mean."""
        self._last, self._sent, self._imbalance = iteration, dict(sent_bytes), dict(imbalance)
        if not self._begun_at:
            self._begun_at, self._sent_before = iteration, self._sent
            return
        self._steps.append(OwnStep.of(spans))
        if len(self._steps) == self._interval:
            self.report()

    def report(self) -> None:
        """Say what the steps since the last report took, if there are any."""
        if not self._steps:
            return
        sent = {module: total - self._sent_before.get(module, 0) for module, total in self._sent.items()}
        shared = self._numbers.agree(self._steps, sent, self._imbalance)
        scalars = name_scalars(shared, self._predicted)
        first = self._last - len(self._steps) + 1
        if self._speaks:
            print(describe(first, self._last, shared, self._predicted), flush=True)
        if self._lines is not None:
            self._lines.append(self._last, scalars, since=self._begun_at)
        writer = self._writer()
        if writer is not None:
            write_scalars(writer, self._last, scalars)
        if self._timelines is not None:
            index = sorted(range(len(self._steps)), key=shared.step_s.__getitem__)[len(self._steps) // 2]
            step_s, spans = shared.step_s[index], self._steps[index].spans
            self._timelines.write(first + index, step_s, spans, since=self._begun_at)
        self._steps, self._sent_before = [], self._sent
