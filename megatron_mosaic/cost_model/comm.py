"""Seconds of a collective: ring formulas on a cluster's links, or the measured lines of a profile.

Ring algorithms (Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH"),
n ranks, B bytes of the full tensor, latency a, bandwidth w:

    all_reduce                    2 (n-1) a + 2 (n-1)/n B/w
    all_gather, reduce_scatter      (n-1) a +   (n-1)/n B/w
    p2p                                   a +           B/w

Across nodes every GPU brings its own network port: a group with g ranks on each node can drive g ports at once.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from megatron_mosaic.cluster import Cluster
from megatron_mosaic.cost_model.fit import FittedProfile
from megatron_mosaic.cost_model.profile import Operation


class CommModel(Protocol):
    """Predicts seconds of one operation over a group of global ranks."""

    def estimate(self, operation: Operation, ranks: tuple[int, ...], num_bytes: float) -> float: ...


class RingComm:
    """Formulas above, on the slowest link of the group."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def estimate(self, operation: Operation, ranks: tuple[int, ...], num_bytes: float) -> float:
        n = len(ranks)
        if n == 1 or num_bytes == 0:
            return 0.0
        link = self.cluster.link_between(ranks)
        bytes_per_s = link.bytes_per_s
        if operation is Operation.p2p:
            return link.latency_s + num_bytes / bytes_per_s
        if link is self.cluster.inter:
            ports = min(Counter(map(self.cluster.node_of, ranks)).values())
            bytes_per_s = min(self.cluster.intra.bytes_per_s, ports * bytes_per_s)
        rounds = 2 if operation is Operation.all_reduce else 1
        return rounds * ((n - 1) * link.latency_s + (n - 1) / n * num_bytes / bytes_per_s)


class MeasuredComm:
    """Lines of a profile; which ranks does not matter on one machine, only how many."""

    def __init__(self, fitted: FittedProfile) -> None:
        self.fitted = fitted

    def estimate(self, operation: Operation, ranks: tuple[int, ...], num_bytes: float) -> float:
        if len(ranks) == 1 or num_bytes == 0:
            return 0.0
        size = 2 if operation is Operation.p2p else len(ranks)
        return self.fitted.collective(operation, size).at(num_bytes)
