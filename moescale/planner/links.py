"""Time of collectives: an alpha-beta model per level of the network, from how far apart a group's ranks are.

Ranks are numbered as the mesh lays them out, ``tp`` innermost; ``stride`` is the distance between two neighbours of a
group, so a group lies within a node where ``ranks * stride`` GPUs do.
"""

from __future__ import annotations

import math

from moescale.planner.cluster import Cluster, Link


def link_of(cluster: Cluster, ranks: int, stride: int) -> Link:
    """The slowest link that a group's messages cross."""
    return cluster.intra_node if ranks * stride <= cluster.gpus_per_node else cluster.inter_node


def ring_seconds(cluster: Cluster, num_bytes: float, ranks: int, stride: int) -> float:
    """All-gather to, or reduce-scatter from, ``num_bytes`` per rank.

    A ring moves ``(p - 1) / p`` of the bytes past every rank (Thakur et al. 2005); between N nodes the links of all
    its GPUs carry ``(N - 1) / N`` of them together. The slower of the two levels counts, for they run at once; latency
    is that of a tree.
    """
    if ranks == 1 or num_bytes == 0:
        return 0.0
    per_node = _ranks_per_node(cluster, ranks, stride)
    nodes = math.ceil(ranks / per_node)
    latency = math.ceil(math.log2(ranks)) * link_of(cluster, ranks, stride).latency_seconds
    inside = (ranks - 1) / ranks * num_bytes / cluster.intra_node.bytes_per_second if per_node > 1 else 0.0
    between = (nodes - 1) / nodes * num_bytes / (per_node * cluster.inter_node.bytes_per_second)
    return max(inside, between) + latency


def all_to_all_seconds(cluster: Cluster, num_bytes: float, ranks: int, stride: int) -> float:
    """Each rank sends ``num_bytes``, an equal part to every one of ``ranks``, itself included.

    Nothing is forwarded: the part for ranks of other nodes leaves over the rank's own link between nodes.
    """
    if ranks == 1:
        return 0.0
    per_node = _ranks_per_node(cluster, ranks, stride)
    inside = (per_node - 1) / ranks * num_bytes / cluster.intra_node.bytes_per_second
    between = (ranks - per_node) / ranks * num_bytes / cluster.inter_node.bytes_per_second
    return max(inside, between) + link_of(cluster, ranks, stride).latency_seconds


def _ranks_per_node(cluster: Cluster, ranks: int, stride: int) -> int:
    return max(1, min(ranks, cluster.gpus_per_node // stride))
