"""One end of an edge: which of the two modules is meant, as a value instead of a flag beside the edge."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mosaic.plan.workload import Edge


@dataclass(frozen=True, slots=True)
class EdgeEnd:
    """An edge seen from one of its two modules.

    At the source, rows leave the module's last stage and their gradients come back; at the target, rows arrive on the
    first stage and their gradients leave.
    """

    edge: Edge
    module: str

    def __post_init__(self) -> None:
        assert self.module in (self.edge.source, self.edge.target), f"{self.module} is not at {self.edge}"

    @classmethod
    def source_of(cls, edge: Edge) -> EdgeEnd:
        return cls(edge, edge.source)

    @classmethod
    def target_of(cls, edge: Edge) -> EdgeEnd:
        return cls(edge, edge.target)

    @property
    def is_source(self) -> bool:
        return self.module == self.edge.source

    @property
    def opposite(self) -> EdgeEnd:
        return EdgeEnd(self.edge, self.edge.target if self.is_source else self.edge.source)

    def in_order(self, own: int, opposite: int) -> tuple[int, int]:
        """A number of this end and one of the other, the source's first."""
        return (own, opposite) if self.is_source else (opposite, own)
