"""What a rank's slices keep, one after the other: a frozen one leaves nothing behind.

    forward    s0  s1 (frozen)  s2       held   s0   s0      s0 s2
                                         moment s0   s0 s1   s0 s2      each with the workspace of the slice at work

Backwards free in the opposite order, so that no moment of theirs holds more than that of the same slice's forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from megatron_mosaic.cost_model.effects.memory import Memory
from megatron_mosaic.cost_model.price import StageCost
from megatron_mosaic.schedules import Kind


@dataclass(frozen=True)
class Activations:
    """Of one rank: what waits for backwards, and the fullest moment so far."""

    held: Memory = field(default_factory=Memory)
    fullest: Memory = field(default_factory=Memory)

    @cached_property
    def held_bytes(self) -> float:
        return self.held.total

    @cached_property
    def fullest_bytes(self) -> float:
        return self.fullest.total

    def after(self, cost: StageCost) -> Activations:
        """When the next slice's forward is done."""
        at_work = self.held + cost.memory.unit
        moment = at_work + Memory(workspace=cost.memory.workspace_bytes)
        return Activations(
            held=at_work if cost.seconds(Kind.B) else self.held,
            fullest=moment if moment.total > self.fullest_bytes else self.fullest,
        )


NONE = Activations()


def after_slice(ranks: Iterable[int], cost: StageCost, before: Mapping[int, Activations]) -> dict[int, Activations]:
    """Of the ranks that worked on a slice. Those that were one before stay one: a large plan has few different ones."""
    found, made = dict[int, Activations](), dict[int, Activations]()
    for rank in ranks:
        own = before.get(rank, NONE)
        if id(own) not in made:
            made[id(own)] = own.after(cost)
        found[rank] = made[id(own)]
    return found
