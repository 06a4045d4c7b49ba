"""Sizes of the exchange between experts that reads peers' memory: what its buffers take and how many bytes it moves.

T tokens of a rank, K experts a token, ep ranks: any routing fits C = ep * T * min(K, E / ep) rows on a rank, and
pre-activations of S = 1.125 * T * K of them are kept (``runtime.peer_dispatch``, ``kernels.dispatch.buffers``). In fp8,
tokens and the gradients of their results take a byte an element; what comes back does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moescale.config import ModelConfig
from moescale.formats import FP8_COPY_ROWS
from moescale.plan import SAVED_ROWS_FACTOR, MeshShape
from moescale.planner.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class PeerExchange:
    """The exchange of one layer and micro-batch."""

    tokens: int
    hidden: int
    intermediate: int
    top_k: int
    num_experts: int
    ranks: int
    itemsize: int
    in_fp8: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, dims: Mapping[str, int], ranks: int, itemsize: int, *, in_fp8: bool = False
    ) -> PeerExchange:
        """For the tokens of ``dims`` of one rank."""
        return cls(
            tokens=dims["n"],
            hidden=dims["h"],
            intermediate=dims["f"],
            top_k=dims["k"],
            num_experts=config.num_experts or 0,
            ranks=ranks,
            itemsize=itemsize,
            in_fp8=in_fp8,
        )

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def most_rows(self) -> int:
        """C"""
        return self.ranks * self.tokens * min(self.top_k, self.num_experts // self.ranks)

    @property
    def saved_rows(self) -> int:
        """S"""
        return min(self.most_rows, math.ceil(SAVED_ROWS_FACTOR * self.pairs))

    def symmetric_bytes(self) -> int:
        """The block that a rank shows its peers, one for all layers."""
        row = self.hidden * self.itemsize
        shown = self.hidden + 4 if self.in_fp8 else row
        tables = 4 * (self.most_rows + 3 * self.pairs + self.num_experts)
        return 2 * self.tokens * shown + self.most_rows * row + tables

    def kept_bytes(self, *, keeps_pre_activation: bool) -> int:
        """What a layer keeps for its backward, beyond its own tokens."""
        pre = self.saved_rows * 2 * self.intermediate * self.itemsize if keeps_pre_activation else 0
        return pre + 4 * (self.ranks * self.pairs + self.most_rows + self.pairs)

    def backward_bytes(self, *, keeps_pre_activation: bool) -> int:
        """What the backward of a layer's experts makes and gives back: tokens' rows, gradients, activations."""
        beyond = self.most_rows - (self.saved_rows if keeps_pre_activation else 0)
        if self.in_fp8:
            return self._fp8_backward_bytes(beyond)
        columns = self.most_rows * (2 * self.hidden + 3 * self.intermediate) + beyond * 2 * self.intermediate
        return columns * self.itemsize

    def _fp8_backward_bytes(self, beyond: int) -> int:
        """The same of ``kernels.dispatch.fp8_mlp``: at most in SwiGLU's backward, or in the gradient of gate and up."""
        local_experts = self.num_experts // self.ranks
        # Each expert's rows are padded, and memory is there for any routing.
        transposed = (self.most_rows // FP8_COPY_ROWS + local_experts) * FP8_COPY_ROWS
        stays = self.most_rows * (2 * self.hidden + 3 * self.intermediate)
        in_swiglu = (self.most_rows + 2 * beyond) * self.intermediate * self.itemsize
        return stays + max(in_swiglu, transposed * (self.hidden + 3 * self.intermediate))

    def pass_seconds(self, cluster: Cluster) -> tuple[float, float]:
        """Forward and backward: publish, barrier, pull, and after the experts barrier and combine.

        A token is pulled once however many of a rank's experts it chose: with probability 1 - (1 - 1/ep)^K, where
        choices are independent. The backward publishes and pulls tokens and gradients.
        """
        link, token = cluster.peer_reads, self.tokens * self.hidden * self.itemsize
        shown = self.tokens * self.hidden if self.in_fp8 else token
        chosen = 1 - (1 - 1 / self.ranks) ** self.top_k
        publish = (token + shown) / cluster.memory_bytes_per_second
        pull = shown * (self.ranks - 1) * chosen / link.bytes_per_second
        combine = token * self.top_k * (self.ranks - 1) / self.ranks / link.bytes_per_second
        barriers = 2 * link.latency_seconds
        return publish + pull + combine + barriers, 2 * (publish + pull) + combine + barriers


def row_factor(config: ModelConfig, mesh: MeshShape, router_imbalance: float) -> float:
    """Slots of the fullest rank behind an all-to-all over its rows under even routing.

    Two ranks send blocks for any routing (``runtime.expert_parallel.PaddedExchange``), whose padding is sent and kept
    like rows: twice as many. More ranks send what there is.
    """
    if mesh.ep == 2:
        return 2 * min(config.top_k, (config.num_experts or 0) // 2) / config.top_k
    return router_imbalance


def reads_peers(mesh: MeshShape, sharding: str, cluster: Cluster) -> bool:
    """Whether experts exchange rows by reading peers' memory: whole dense weights, and ep ranks in one node."""
    return sharding == "zero1" and 1 < mesh.ep <= cluster.gpus_per_node


def can_divide_fp8(mesh: MeshShape, sharding: str, cluster: Cluster) -> bool:
    """Whether experts in fp8 are planned on ``mesh``: not divided, or among ranks that read each other's memory."""
    return mesh.ep == 1 or reads_peers(mesh, sharding, cluster)


def is_recorded(mesh: MeshShape, sharding: str, cluster: Cluster, compute_dtype: str) -> bool:
    """Whether a micro-batch is one CUDA graph, for which the host launches no kernels one by one."""
    if mesh.gpus == 1:
        return True
    return compute_dtype == "bf16" and sharding == "zero1" and (mesh.ep == 1 or reads_peers(mesh, sharding, cluster))
