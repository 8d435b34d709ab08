"""Seconds of a collective: ring formulas on a cluster's links, or the measured lines of a profile.

Ring algorithms (Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH"),
n ranks, B bytes of the full tensor, latency a, bandwidth w:

    all_reduce                    2 (n-1) a + 2 (n-1)/n B/w
    all_gather, reduce_scatter      (n-1) a +   (n-1)/n B/w
    all_to_all                      (n-1) a +   (n-1)/n B/w      B: what one rank sends; across N nodes of g ranks
                                        N a +   (n-g)/n B/w      what leaves a node, each rank through its own port
    p2p                                   a +           B/w

Across nodes every GPU brings its own network port: a group with g ranks on each node can drive g ports at once.
"""

from __future__ import annotations

from typing import Protocol

from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.plan.cluster import Cluster


class CommModel(Protocol):
    """Predicts seconds of one operation over a group."""

    def estimate(self, operation: Operation, group: Group, num_bytes: float) -> float: ...


class RingComm:
    """Formulas above, on the slowest link of the group."""

    def __init__(self, cluster: Cluster) -> None:
        self.intra, self.inter = cluster.intra, cluster.inter
        self._frac = cluster.gpu.network_frac

    def estimate(self, operation: Operation, group: Group, num_bytes: float) -> float:
        if group.size == 1 or num_bytes == 0:
            return 0.0
        if operation is Operation.p2p:
            link = self.intra if group.nodes == 1 else self.inter
            return link.latency_s + num_bytes / (link.bytes_per_s * self._frac)
        return self._collective(operation, group, num_bytes)

    def _collective(self, operation: Operation, group: Group, num_bytes: float) -> float:
        """Inside a node a ring; across nodes rings through all ports, with the hops inside a node at its latency."""
        n, nodes, intra, inter = group.size, group.nodes, self.intra, self.inter
        rounds = 2 if operation is Operation.all_reduce else 1
        if nodes == 1:
            latency_s, bytes_per_s = (n - 1) * intra.latency_s, intra.bytes_per_s
        elif operation is Operation.all_to_all:
            leaving = (n - group.fewest) / n  # of what a rank sends, the share for other nodes
            return nodes * inter.latency_s + leaving * num_bytes / (inter.bytes_per_s * self._frac)
        else:
            bytes_per_s = min(intra.bytes_per_s, group.fewest * inter.bytes_per_s)
            hops = (n - 1) * inter.latency_s
            # beyond a ring's reach trees take over: their latency grows with the logarithm (NCCL 2.4)
            latency_s = min(hops, (n // nodes - 1) * intra.latency_s + 2 * (nodes - 1).bit_length() * inter.latency_s)
        return rounds * (latency_s + (n - 1) / n * num_bytes / (bytes_per_s * self._frac))


class MeasuredComm:
    """Lines of a profile; which ranks does not matter on one machine, only how many."""

    def __init__(self, fitted: FittedProfile) -> None:
        self.fitted = fitted

    def estimate(self, operation: Operation, group: Group, num_bytes: float) -> float:
        if group.size == 1 or num_bytes == 0:
            return 0.0
        size = 2 if operation is Operation.p2p else group.size
        return self.fitted.collective(operation, size).at(num_bytes)
