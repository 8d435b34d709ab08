"""One end of an edge: which of the two modules is meant, as a value instead of a flag beside the edge."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mosaic.plan.workload import Edge


class EdgeEnd(NamedTuple):
    """An edge seen from one of its two modules; a tuple, because a step looks up dozens of things by it.

    At the source, rows leave the module's last stage and their gradients come back; at the target, rows arrive on the
    first stage and their gradients leave.
    """

    source: str
    target: str
    module: str  # one of the two

    @classmethod
    def source_of(cls, edge: Edge) -> EdgeEnd:
        return cls(edge.source, edge.target, edge.source)

    @classmethod
    def target_of(cls, edge: Edge) -> EdgeEnd:
        return cls(edge.source, edge.target, edge.target)

    @property
    def is_source(self) -> bool:
        return self.module == self.source

    @property
    def opposite(self) -> EdgeEnd:
        return EdgeEnd(self.source, self.target, self.target if self.is_source else self.source)

    def in_order(self, own: int, opposite: int) -> tuple[int, int]:
        """A number of this end and one of the other, the source's first."""
        return (own, opposite) if self.is_source else (opposite, own)
