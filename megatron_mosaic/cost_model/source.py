"""Where seconds come from: a profile of this machine, or formulas of a GPU type. Chosen once, here.

StageWork --CostSource--> ActionCost, seconds of collectives, of the tail, and how ranks share what they compute on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_mosaic.cost_model.effects.comm import CommModel
from megatron_mosaic.cost_model.effects.memory import Precision
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.profile import Overheads
from megatron_mosaic.cost_model.machine import Machine
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.schedules.actions import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionCost:
    """Seconds that one action keeps its ranks busy, by cause.

    `comm_s`: what collectives in its layers add; nothing where the host's launches take longer anyway.
    """

    compute_s: float
    comm_s: float

    @property
    def busy_s(self) -> float:
        return self.compute_s + self.comm_s


class CostSource(Protocol):
    """Predicts what StageWork and a few numbers of the step cost. Deterministic, no I/O."""

    @property
    def name(self) -> str:
        """For `predicted.cost_model`."""

    @property
    def setup(self) -> TrainingSetup: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def comm(self) -> CommModel: ...

    @property
    def overheads(self) -> Overheads: ...

    def action_cost(self, work: StageWork, kind: Kind) -> ActionCost:
        """Of one full unit, through all virtual stages of the stage."""

    def threads(self, work: StageWork) -> int:
        """Cores that a rank computes on: 1 on a GPU, where nobody else's device is touched."""

    def machine(self, threads: Sequence[int]) -> Machine:
        """What lanes compute on whose actions use so many threads, on all ranks of their stages together."""

    def optimizer_s(self, num_parameters: float) -> float:
        """Of a rank's optimizer step over so many parameters."""

    def consensus_s(self, world: Group) -> float:
        """In which all ranks agree on a few numbers."""
