"""What a rank shows its peers: one block of memory with the same layout on every rank of a group.

Ranks r = 0 .. P-1 hold the experts [r * E / P, (r + 1) * E / P) and bring up to T tokens each. One set serves all
layers: what a layer has published is overwritten by the next one, after a barrier that every rank reaches only when
it has read it (see ``moescale.runtime.peer_dispatch``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from moescale.kernels.fp8.scaled import E4M3

ALIGNMENT_BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeShape:
    """Sizes of the exchange of one group; the same on all its ranks."""

    num_ranks: int
    """P"""
    num_tokens: int
    """T: the most tokens that any rank brings to a layer."""
    hidden_size: int
    """H"""
    num_experts: int
    """E, of all ranks together; a multiple of P."""
    top_k: int
    """K"""
    dtype: torch.dtype
    """Of tokens and rows."""
    in_fp8: bool = False
    """Whether tokens and the gradients of their results are shown in e4m3, with a scale each."""

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def num_pairs(self) -> int:
        """T * K"""
        return self.num_tokens * self.top_k

    @property
    def max_rows(self) -> int:
        """C: the rows of a rank that all tokens of all ranks choose. A token chooses an expert at most once."""
        return self.num_ranks * self.num_tokens * min(self.top_k, self.num_local_experts)

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of :class:`ExchangeBuffers`, in their order in memory."""
        shown = E4M3 if self.in_fp8 else self.dtype
        scales = {f"{name}_scales": ((self.num_tokens,), torch.float32) for name in ("token", "gradient")}
        return {
            "tokens": ((self.num_tokens, self.hidden_size), shown),
            "gradients": ((self.num_tokens, self.hidden_size), shown),
            "results": ((self.max_rows, self.hidden_size), self.dtype),
            "values": ((self.max_rows,), torch.float32),
            "ids": ((self.num_pairs,), torch.int32),
            "pair_rows": ((self.num_pairs,), torch.int32),
            "weights": ((self.num_pairs,), torch.float32),
            "ends": ((self.num_experts,), torch.int32),
            **(scales if self.in_fp8 else {}),
        }

    def offsets(self) -> dict[str, int]:
        """Where each tensor begins, in bytes from the start of the block."""
        offsets, end = {}, 0
        for name, (shape, dtype) in self.fields().items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return offsets

    @property
    def num_bytes(self) -> int:
        """Size of a rank's block."""
        name, (shape, dtype) = list(self.fields().items())[-1]
        return self.offsets()[name] + -(-math.prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerTensor:
    """A tensor that every rank of a group has at an address known to all."""

    local: torch.Tensor
    """This rank's."""
    addresses: torch.Tensor
    """[P] int64, on the device: where each rank's begins, readable from this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeBuffers:
    """The block of one rank and the addresses of all. See :class:`ExchangeShape` for the sizes."""

    shape: ExchangeShape
    rank: int
    tokens: PeerTensor
    """[T, H]: the tokens of this rank."""
    gradients: PeerTensor
    """[T, H]: the gradients of what the experts gave them."""
    results: PeerTensor
    """[C, H]: what this rank's experts computed: results forward, gradients of their rows backward."""
    values: PeerTensor
    """[C] fp32: the gradients of the routing weights of this rank's rows."""
    ids: PeerTensor
    """[T * K] int32: the expert of every pair, -1 for a pair that goes nowhere."""
    pair_rows: PeerTensor
    """[T * K] int32: the row of every pair, counted in this rank's pairs sorted by expert."""
    weights: PeerTensor
    """[T * K] fp32: the routing weight of every pair."""
    ends: PeerTensor
    """[E] int32: this rank's pairs of each expert, cumulative."""
    token_scales: PeerTensor | None = None
    """[T] fp32, where tokens are in fp8."""
    gradient_scales: PeerTensor | None = None
    """[T] fp32, of the gradients."""

    @classmethod
    def carve(cls, shape: ExchangeShape, rank: int, block: torch.Tensor, addresses: Sequence[int]) -> ExchangeBuffers:
        """Lay the tensors out in ``block`` [``shape.num_bytes``] uint8; ``addresses`` of all ranks' blocks."""
        bases = torch.tensor(list(addresses), dtype=torch.int64)
        offsets = shape.offsets()
        tensors = {}
        for name, (sizes, dtype) in shape.fields().items():
            start, length = offsets[name], math.prod(sizes) * dtype.itemsize
            local = block[start : start + length].view(dtype).view(sizes)
            tensors[name] = PeerTensor(local=local, addresses=(bases + start).to(block.device))
        return cls(shape=shape, rank=rank, **tensors)
