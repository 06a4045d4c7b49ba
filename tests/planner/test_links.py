from __future__ import annotations

import dataclasses

import pytest

from moescale.planner.cluster import Link, load_cluster
from moescale.planner.links import all_to_all_seconds, link_of, ring_seconds

# 1 GB/s within a node of four, a tenth of it between nodes, no latency.
CLUSTER = dataclasses.replace(
    load_cluster("h100-sxm"),
    gpus_per_node=4,
    intra_node=Link(latency_seconds=0.0, bytes_per_second=1e9),
    inter_node=Link(latency_seconds=0.0, bytes_per_second=1e8),
)


def test_a_gather_within_a_node_moves_what_a_rank_does_not_hold() -> None:
    assert ring_seconds(CLUSTER, 4e9, 4, 1) == pytest.approx(3.0)
    assert ring_seconds(CLUSTER, 4e9, 1, 1) == 0.0


def test_between_nodes_all_links_of_a_node_carry_a_gather_together() -> None:
    # Two nodes: half of the 4 GB enters each node over four links of 0.1 GB/s.
    assert ring_seconds(CLUSTER, 4e9, 8, 1) == pytest.approx(2e9 / 4e8)


def test_ranks_on_different_nodes_have_only_their_own_link() -> None:
    assert ring_seconds(CLUSTER, 4e9, 2, 4) == pytest.approx(2e9 / 1e8)
    assert link_of(CLUSTER, 2, 4) == CLUSTER.inter_node
    assert link_of(CLUSTER, 2, 2) == CLUSTER.intra_node


def test_an_exchange_sends_over_each_ranks_own_link() -> None:
    assert all_to_all_seconds(CLUSTER, 4e9, 4, 1) == pytest.approx(3.0)
    # Of eight parts four go to the other node.
    assert all_to_all_seconds(CLUSTER, 8e9, 8, 1) == pytest.approx(4e9 / 1e8)
    assert all_to_all_seconds(CLUSTER, 8e9, 1, 1) == 0.0


def test_every_message_pays_latency() -> None:
    slow = dataclasses.replace(CLUSTER, intra_node=Link(latency_seconds=1.0, bytes_per_second=1e9))
    assert ring_seconds(slow, 4e9, 4, 1) == pytest.approx(3.0 + 2.0)
    assert all_to_all_seconds(slow, 4e9, 4, 1) == pytest.approx(3.0 + 1.0)
