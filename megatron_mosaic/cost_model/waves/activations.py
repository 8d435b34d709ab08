"""What a rank's slices keep, one after the other: a frozen one leaves nothing behind.

    forward    s0  s1 (frozen)  s2       held   s0   s0      s0 s2
                                         moment s0   s0 s1   s0 s2      each with the workspace of the slice at work

Backwards free in the opposite order, so that no moment of theirs holds more than that of the same slice's forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mosaic.cost_model.effects.memory import Memory
from megatron_mosaic.cost_model.price import StageCost
from megatron_mosaic.schedules import Kind


@dataclass(frozen=True, slots=True)
class Activations:
    """Of one rank: what waits for backwards, and the fullest moment so far."""

    held: Memory = field(default_factory=Memory)
    fullest: Memory = field(default_factory=Memory)

    def after(self, cost: StageCost) -> Activations:
        """When the next slice's forward is done."""
        at_work = self.held + cost.memory.unit
        moment = at_work + Memory(workspace=cost.memory.workspace_bytes)
        return Activations(
            held=at_work if cost.seconds(Kind.B) else self.held,
            fullest=max(self.fullest, moment, key=lambda memory: memory.total),
        )
