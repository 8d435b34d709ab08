"""Seconds of a collective: ring formulas on a cluster's links, or the measured lines of a profile.

Ring algorithms (Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH"),
n ranks, B bytes of the full tensor, latency a, bandwidth w:

    all_reduce                    2 (n-1) a + 2 (n-1)/n B/w
    all_gather, reduce_scatter      (n-1) a +   (n-1)/n B/w
    all_to_all                      (n-1) a +   (n-1)/n B/w      B: what one rank sends; across N nodes of g ranks
                                        N a +   (n-g)/n B/w      what leaves a node, each rank through its own port;
                                                                 what stays in it takes NVLink at the same time
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
        gpu = cluster.gpu
        self._intra_bytes_per_s = cluster.intra.bytes_per_s * gpu.intra_frac
        self._inter_bytes_per_s = cluster.inter.bytes_per_s * gpu.network_frac

    def estimate(self, operation: Operation, group: Group, num_bytes: float) -> float:
        if group.size == 1 or num_bytes == 0:
            return 0.0
        if operation is Operation.p2p:
            if group.nodes == 1:
                return self.intra.latency_s + num_bytes / self._intra_bytes_per_s
            return self.inter.latency_s + num_bytes / self._inter_bytes_per_s
        return self._collective(operation, group, num_bytes)

    def _collective(self, operation: Operation, group: Group, num_bytes: float) -> float:
        """Inside a node a ring; across nodes rings through all ports, with the hops inside a node at its latency."""
        n, nodes, intra, inter = group.size, group.nodes, self.intra, self.inter
        rounds = 2 if operation is Operation.all_reduce else 1
        if nodes == 1:
            latency_s, bytes_per_s = (n - 1) * intra.latency_s, self._intra_bytes_per_s
        elif operation is Operation.all_to_all:
            leaving, staying = (n - group.fewest) / n, (group.fewest - 1) / n  # shares of what a rank sends
            across_s = leaving * num_bytes / self._inter_bytes_per_s
            return nodes * inter.latency_s + max(across_s, staying * num_bytes / self._intra_bytes_per_s)
        else:
            bytes_per_s = min(self._intra_bytes_per_s, group.fewest * self._inter_bytes_per_s)
            hops = (n - 1) * inter.latency_s
            # beyond a ring's reach trees take over: their latency grows with the logarithm (NCCL 2.4)
            latency_s = min(hops, (n // nodes - 1) * intra.latency_s + 2 * (nodes - 1).bit_length() * inter.latency_s)
        return rounds * (latency_s + (n - 1) / n * num_bytes / bytes_per_s)


class MeasuredComm:
    """Lines of a profile; which ranks does not matter on one machine, only how many."""

    def __init__(self, fitted: FittedProfile) -> None:
        self.fitted = fitted

    def estimate(self, operation: Operation, group: Group, num_bytes: float) -> float:
        if group.size == 1 or num_bytes == 0:
            return 0.0
        size = 2 if operation is Operation.p2p else group.size
        return self.fitted.collective(operation, size).at(num_bytes)
