"""Who looks on while a rank trains, and what they leave behind: losses, timeline, measures, dumps.

Nothing here changes what is computed.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import ModuleOptimizers
from megatron_mosaic.runtime.activation_meter import ActivationMeter
from megatron_mosaic.runtime.dumps.writer import Dump
from megatron_mosaic.runtime.model import MosaicModel
from megatron_mosaic.schedules.timeline import Span

ITERATION = "iteration"
LOSSES_FILE = "losses.jsonl"
TIMELINE_FILE = "timeline.json"
MEASURES_FILE = "measures.json"
KEPT_STEPS = 200  # whose spans are in memory for the timeline


class StepReport:
    """Losses (rank 0, written at once) and spans (kept, gathered at the end). `_has_begun`: a step was written.

    A run that goes on from a checkpoint appends its losses; what an earlier start had beyond the checkpoint goes.
    """

    def __init__(self, directory: str, rank: int) -> None:
        self._directory, self._rank = Path(directory), rank
        self._directory.mkdir(parents=True, exist_ok=True)
        self._steps: deque[list[Span]] = deque(maxlen=KEPT_STEPS)
        self._has_begun = False

    def add_losses(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Append one step's losses. Iterations count from 1, over all starts of a run."""
        if self._rank == 0:
            path = self._directory / LOSSES_FILE
            if not self._has_begun:
                _keep_before(path, iteration)
                self._has_begun = True
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({ITERATION: iteration, **losses}) + "\n")

    def add_spans(self, spans: Sequence[Span]) -> None:
        """Keep one step's spans of this rank."""
        self._steps.append(list(spans))

    def write(
        self, world: dist.ProcessGroup, measures: Mapping[str, Mapping[str, float]], group_creation_s: float
    ) -> None:
        """Collective. Rank 0 writes both files.

        `timeline.json`: seconds of the last 200 steps, and all spans of their median. The first tenth of the steps (at
        least one, if there are more) is warm-up and is not considered.
        `measures.json`: `measures` of all ranks; for each module the largest value; and `group_creation_s`, of the
        slowest rank.
        """
        gathered: list[Any] = [None] * dist.get_world_size(world)
        dist.all_gather_object(gathered, (list(self._steps), measures, group_creation_s), group=world)
        if self._rank != 0 or not self._steps:
            return
        largest: dict[str, dict[str, float]] = {}
        for _, one, _ in gathered:
            for key, by_module in one.items():
                into = largest.setdefault(key, {})
                for module, value in by_module.items():
                    into[module] = max(into.get(module, 0), value)
        measured = {**largest, "group_creation_s": max(seconds for _, _, seconds in gathered)}
        (self._directory / MEASURES_FILE).write_text(json.dumps(measured), encoding="utf-8")
        steps = [[span for spans, _, _ in gathered for span in spans[i]] for i in range(len(self._steps))]
        begins = [min(span.start_s for span in step) for step in steps]
        seconds = [max(span.end_s for span in step) - begin for step, begin in zip(steps, begins, strict=True)]
        warm = list(range(min(len(steps) - 1, max(1, len(steps) // 10)), len(steps)))
        median = sorted(warm, key=seconds.__getitem__)[len(warm) // 2]
        spans = [
            [span.rank, span.lane, span.start_s - begins[median], span.end_s - begins[median], span.label]
            for span in sorted(steps[median])
        ]
        data = {"step": median, "step_s": seconds[median], "seconds": seconds, "spans": spans}
        (self._directory / TIMELINE_FILE).write_text(json.dumps(data), encoding="utf-8")


def _keep_before(path: Path, iteration: int) -> None:
    """Leave the lines of earlier iterations, whole ones alone: a start may have been killed while it wrote.

    A line that names no iteration is of no earlier one.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if iteration > 1 and path.exists() else []
    steps = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, step in steps if step.get(ITERATION, iteration) < iteration]
    path.write_text("".join(kept), encoding="utf-8")


class UnitStatistics:
    """How units fell onto this rank's dp slots: which were empty, and how far the busiest slot was above the mean."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._empty = dict.fromkeys(modules, 0)
        self._imbalance = {name: [0.0, 0.0, 0.0] for name in self._empty}  # sums by owner and as it was, units

    def note(self, module: str, *, num_empty: int, imbalance: tuple[float, float]) -> None:
        """Count one unit. `imbalance`: as the samples' owners would have it, and as it was."""
        self._empty[module] += num_empty
        sums, found = self._imbalance[module], (*imbalance, 1)
        self._imbalance[module] = [old + new for old, new in zip(sums, found, strict=True)]

    def measures(self) -> dict[str, Mapping[str, float]]:
        """Empty units, and mean imbalance over all units so far, by module."""
        names = ("imbalance_by_owner", "imbalance_by_module")
        means = {
            key: {module: sums[i] / sums[2] for module, sums in self._imbalance.items() if sums[2]}
            for i, key in enumerate(names)
        }
        return {"empty_units_by_module": self._empty, **means}


@dataclass(frozen=True, slots=True, kw_only=True)
class Observers:
    """All that look on at a rank's steps; without any, nobody does (evaluation)."""

    units: UnitStatistics | None = None
    meter: ActivationMeter | None = None
    report: StepReport | None = None
    dump: Dump | None = None

    def forward(
        self, module: str, unit: Hashable, kept: Iterable[Tensor] = ()
    ) -> contextlib.AbstractContextManager[None]:
        """Around a forward whose backward follows. `kept`: what lives until then beside what autograd saves."""
        return contextlib.nullcontext() if self.meter is None else self.meter.forward(module, unit, kept)

    def backward(self, module: str, unit: Hashable) -> None:
        """The backward of such a forward has run."""
        if self.meter is not None:
            self.meter.backward(module, unit)

    def losses(self, iteration: int, losses: Mapping[str, float]) -> None:
        """A training step came to these."""
        if self.report is not None:
            self.report.add_losses(iteration, losses)

    def finished_gradients(self, model: MosaicModel, optimizers: ModuleOptimizers) -> None:
        """The optimizers are about to use them."""
        if self.dump is not None:
            self.dump.write_gradients(model, optimizers)

    def finished_step(self, spans: Callable[[], Sequence[Span]]) -> None:
        """A training step and its optimizer's took these spans on this rank; whoever asks waits for the device."""
        if self.report is not None:
            self.report.add_spans(spans())

    def finished_training(self, model: MosaicModel) -> None:
        """These parameters are the run's last."""
        if self.dump is not None:
            self.dump.write_parameters(model)

    def measures(self, modules: Iterable[str]) -> dict[str, Mapping[str, float]]:
        """What meter and statistics have found so far, by module."""
        peaks = dict.fromkeys(modules, 0) | (self.meter.peak_bytes if self.meter else {})
        found = self.units.measures() if self.units else {}
        return {"peak_activation_bytes_by_module": peaks, **found}
