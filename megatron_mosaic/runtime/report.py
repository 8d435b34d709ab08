"""Who looks on while a rank trains: reports (`telemetry/`), meters, dumps. Nothing here changes what is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import ModuleOptimizers
from megatron_mosaic.runtime.activation_meter import ActivationMeter
from megatron_mosaic.runtime.dumps.writer import Dump
from megatron_mosaic.runtime.model import MosaicModel
from megatron_mosaic.runtime.telemetry.periodic import PeriodicReport
from megatron_mosaic.runtime.telemetry.step_report import StepReport
from megatron_mosaic.schedules.timeline import Span


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
    periodic: PeriodicReport | None = None
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

    def finished_step(
        self, iteration: int, spans: Callable[[], Sequence[Span]], sent_bytes: Callable[[], Mapping[str, float]]
    ) -> None:
        """A training step and its optimizer's took these spans on this rank; whoever asks waits for the device.

        Collective where there is a periodic report. `sent_bytes`: so far, by module that they left.
        """
        if self.report is None and self.periodic is None:
            return
        found = spans()
        if self.report is not None:
            self.report.add_spans(found)
        if self.periodic is not None:
            measures = self.units.measures() if self.units else {}
            self.periodic.add(iteration, found, sent_bytes(), measures.get("imbalance_by_module", {}))

    def finished_training(self, model: MosaicModel) -> None:
        """Collective. These parameters are the run's last."""
        if self.dump is not None:
            self.dump.write_parameters(model)

    def finish(self, modules: Iterable[str], group_creation_s: float) -> None:
        """Collective. Nothing more will be seen: write what is left to write."""
        if self.periodic is not None:
            self.periodic.report()
        if self.report is not None:
            self.report.write(self.measures(modules), group_creation_s)

    def measures(self, modules: Iterable[str]) -> dict[str, Mapping[str, float]]:
        """What meter and statistics have found so far, by module."""
        peaks = dict.fromkeys(modules, 0) | (self.meter.peak_bytes if self.meter else {})
        found = self.units.measures() if self.units else {}
        return {"peak_activation_bytes_by_module": peaks, **found}
