"""DeepSeek-V3's fp8 recipe (arXiv:2412.19437, section 3.3) in plain torch, to judge errors by; and the exact products.

Blocks of 1 x 128 along the contraction for activations and gradients, 128 x 128 for weights; a block's scale brings its
largest element to 448. Products of the quantised numbers are summed in ``dtype``: with fp64 the recipe is as good as it
can be, for no hardware sums better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fp8_gemm import BLOCK, Scaled
from fp8_quantise import E4M3


def block_quantise(x: torch.Tensor, rows: int = 1) -> Scaled:
    """Return x [..., M, K] in e4m3 with scales [..., M / rows, K / 128] fp32; K and M are padded with zeros."""
    *batch, m, k = x.shape
    padded = F.pad(x.float(), (0, -k % BLOCK, 0, -m % rows))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    largest = blocks.abs().amax((-3, -1), keepdim=True).clamp_min(1e-30)
    quantised = (blocks * (448 / largest)).to(E4M3)
    data = quantised.flatten(-4, -3).flatten(-2)[..., :m, :k].contiguous()
    return Scaled(data=data, scales=(largest / 448).squeeze((-3, -1)))


def dequantise(scaled: Scaled, dtype: torch.dtype, rows: int = 1) -> torch.Tensor:
    """Return what :func:`block_quantise` quantised, rounded to e4m3, in ``dtype``."""
    *_, m, k = scaled.data.shape
    scales = scaled.scales.to(dtype).repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
    return scaled.data.to(dtype) * scales[..., :m, :k]


def rounded(x: torch.Tensor, dtype: torch.dtype, rows: int = 1) -> torch.Tensor:
    """Return x [..., M, K] as the recipe sees it in a product that contracts K."""
    return dequantise(block_quantise(x, rows), dtype, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """The products of an expert MLP in ``dtype``, on operands quantised by the recipe or not at all."""

    dtype: torch.dtype
    quantises: bool

    def operand(self, x: torch.Tensor, rows: int = 1) -> torch.Tensor:
        """Return x [..., M, K] as a product that contracts K takes it."""
        return rounded(x, self.dtype, rows) if self.quantises else x.to(self.dtype)

    def multiply_rows(self, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return rows [R, K] times the weight [E, N, K] of their expert."""
        weight = weight.contiguous()
        parts = [self.operand(rows[part]) @ self.operand(weight[e], BLOCK).T for e, part in _experts(ends)]
        return torch.cat(parts)

    def weight_gradient(self, left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return left[rows of e].T @ right[rows of e] of left [R, M] and right [R, N], [E, M, N]."""
        parts = (
            self.operand(left[part].T.contiguous()) @ self.operand(right[part].T.contiguous()).T
            for _, part in _experts(ends)
        )
        return torch.stack(list(parts))

    def mlp(
        self, rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the result of the expert MLP and its gradients; what is quantised is rounded to bf16 in between."""
        store = (lambda x: x.bfloat16()) if self.quantises else (lambda x: x)
        pre = store(self.multiply_rows(rows, gate_up, ends))
        gate, up = pre.to(self.dtype).chunk(2, -1)
        act = F.silu(gate) * up
        grad_act = store(self.multiply_rows(grad, down.transpose(1, 2), ends)).to(self.dtype)
        sigmoid = torch.sigmoid(gate)
        grad_gate = grad_act * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        grad_pre = torch.cat([grad_gate, grad_act * gate * sigmoid], -1)
        return {
            "out": self.multiply_rows(act, down, ends),
            "grad_rows": self.multiply_rows(grad_pre, gate_up.transpose(1, 2), ends),
            "grad_gate_up": self.weight_gradient(grad_pre, rows, ends),
            "grad_down": self.weight_gradient(grad, act, ends),
        }


def _experts(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    bounds = [0, *ends.tolist()]
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield expert, slice(first, end)


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of ``exact``; nan where x holds one."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()
