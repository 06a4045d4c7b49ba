"""DeepSeek-V3's fp8 recipe (arXiv:2412.19437, section 3.3) in plain torch, to judge errors by; and the exact results.

Blocks of 1 x 128 along the contraction for activations and gradients, 128 x 128 for weights; a block's scale brings its
largest element to 448, or is the smallest power of two that brings it to 448 at most, as from DeepSeek-V3.1 on
(``"scale_fmt": "ue8m0"`` in the configurations of its checkpoints). Products of the quantised numbers are summed in
``dtype``: with fp64 the recipe is as good as it can be, for no hardware sums better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from moescale.kernels.fp8.reference import power_of_two_scale
from moescale.kernels.fp8.scaled import E4M3, LARGEST, Scaled

BLOCK = 128


def block_quantise(x: torch.Tensor, rows: int = 1, *, power_of_two: bool = False) -> Scaled:
    """Return x [..., M, K] in e4m3 with scales [..., M / rows, K / 128] fp32; K and M are padded with zeros."""
    *batch, m, k = x.shape
    padded = F.pad(x.float(), (0, -k % BLOCK, 0, -m % rows))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    largest = blocks.abs().amax((-3, -1), keepdim=True).clamp_min(1e-30)
    if power_of_two:
        scales = power_of_two_scale(largest)
        quantised = blocks / scales
    else:
        scales = largest / LARGEST
        quantised = blocks * (LARGEST / largest)
    data = quantised.to(E4M3).flatten(-4, -3).flatten(-2)[..., :m, :k].contiguous()
    return Scaled(data=data, scales=scales.squeeze((-3, -1)))


def dequantise(scaled: Scaled, dtype: torch.dtype, rows: int = 1) -> torch.Tensor:
    """Return what :func:`block_quantise` quantised, rounded to e4m3, in ``dtype``."""
    *_, m, k = scaled.data.shape
    scales = scaled.scales.to(dtype).repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
    return scaled.data.to(dtype) * scales[..., :m, :k]


def rounded(x: torch.Tensor, dtype: torch.dtype, rows: int = 1, *, power_of_two: bool = False) -> torch.Tensor:
    """Return x [..., M, K] as the recipe sees it in a product that contracts K."""
    return dequantise(block_quantise(x, rows, power_of_two=power_of_two), dtype, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """Experts and linear layers with products in ``dtype``, on operands quantised by the recipe or not at all."""

    dtype: torch.dtype
    quantises: bool
    power_of_two: bool = False
    """Whether scales are powers of two."""

    def operand(self, x: torch.Tensor, rows: int = 1) -> torch.Tensor:
        """Return x [..., M, K] as a product that contracts K takes it."""
        if not self.quantises:
            return x.to(self.dtype)
        return rounded(x, self.dtype, rows, power_of_two=self.power_of_two)

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as it is kept between two products."""
        return x.bfloat16() if self.quantises else x

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
        store = self.store
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

    def experts(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        grad: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the result of routed experts on tokens x [T, H] and its gradients; an id below 0 is no expert's."""
        ids, weights = topk_ids.flatten().long(), topk_weights.flatten().to(self.dtype)
        pair = ids.argsort(stable=True)[(ids < 0).sum() :]
        token, weights = pair // topk_ids.shape[1], weights[pair, None]
        ends = torch.bincount(ids[pair], minlength=down.shape[0]).cumsum(0)
        found = self.mlp(x[token], gate_up, down, self.store(grad[token].to(self.dtype) * weights), ends)
        zeros = torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        of_weights = torch.zeros(ids.shape, dtype=self.dtype, device=x.device)
        of_weights[pair] = (grad[token].to(self.dtype) * found["out"]).sum(1)
        return {
            "out": zeros.index_add(0, token, found["out"] * weights),
            "grad_x": zeros.index_add(0, token, found["grad_rows"]),
            "grad_topk_weights": of_weights.view(topk_ids.shape),
            "grad_gate_up": found["grad_gate_up"],
            "grad_down": found["grad_down"],
        }

    def linear(self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the result of a linear layer on x [T, K] and its gradients."""
        ends, stacked = torch.tensor([x.shape[0]]), weight.unsqueeze(0)
        return {
            "out": self.multiply_rows(x, stacked, ends),
            "grad_x": self.multiply_rows(grad, stacked.transpose(1, 2), ends),
            "grad_weight": self.weight_gradient(grad, x, ends)[0],
        }


def _experts(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    bounds = [0, *ends.tolist()]
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield expert, slice(first, end)


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of ``exact``; nan where x holds one."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()
