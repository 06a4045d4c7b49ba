"""The parts of :mod:`moescale.kernels.fp8` in plain PyTorch: their definition, and what runs without a Hopper GPU.

Products are made of the quantised numbers in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moescale.formats import FP8_COPY_ROWS
from moescale.kernels.experts.reference import combine_rows, group_rows, order_by_pair, sort_weights
from moescale.kernels.experts.sort import sort_pairs
from moescale.kernels.fp8.scaled import E4M3, LARGEST, Copies, Scaled
from moescale.kernels.swiglu.reference import swiglu as swiglu_in_bf16

LEAST_SCALE = 2.0**-100


def power_of_two_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the smallest powers of two s with ``largest`` / s <= 448, fp32; inf, where ``largest`` is not finite."""
    mantissa, exponent = (largest.float() * (1 / LARGEST)).clamp(min=LEAST_SCALE).frexp()
    scales = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return scales.masked_fill(~largest.isfinite(), float("inf"))


def _to_scale(x: torch.Tensor, scales: torch.Tensor) -> Scaled:
    """Quantise the rows of x [..., R, H] with ``scales`` [..., R]."""
    return Scaled((x.float() / scales.unsqueeze(-1)).to(E4M3), scales)


def quantize_rows(x: torch.Tensor) -> Scaled:
    """Return x [R, H] in e4m3 with scales [R]."""
    return _to_scale(x, power_of_two_scale(x.abs().amax(-1)))


def gather_rows(x: torch.Tensor, pair_row: torch.Tensor, top_k: int) -> tuple[Scaled, Scaled]:
    """Return tokens x [T, H] in e4m3, sorted by expert [R, H] and as they are."""
    tokens = quantize_rows(x)
    return gather_scaled(tokens, pair_row, top_k), tokens


def gather_scaled(tokens: Scaled, pair_row: torch.Tensor, top_k: int) -> Scaled:
    """Return tokens [T, H] sorted by expert, [R, H]."""
    device = pair_row.device
    placed = pair_row >= 0
    token = torch.arange(pair_row.numel(), device=device)[placed] // top_k
    data = torch.zeros((pair_row.numel(), tokens.data.shape[1]), dtype=torch.uint8, device=device)
    scales = torch.zeros(pair_row.numel(), dtype=torch.float32, device=device)
    row = pair_row[placed].long()
    data[row], scales[row] = tokens.data.view(torch.uint8)[token], tokens.scales[token]
    return Scaled(data.view(E4M3), scales)


def swiglu(pre: torch.Tensor, groups: torch.Tensor) -> Scaled:
    """Return silu(gate) * up [R, F] in e4m3 with scales [R], of the pre-activation [R, 2F]."""
    return quantize_rows(exact_swiglu(pre))


def exact_swiglu(pre: torch.Tensor) -> torch.Tensor:
    """Return the same in fp32."""
    gate, up = pre.float().chunk(2, -1)
    return gate * gate.sigmoid() * up


def swiglu_backward(
    grad_act: torch.Tensor, pre: torch.Tensor, row_weights: torch.Tensor, groups: torch.Tensor
) -> tuple[Scaled, Scaled, torch.Tensor]:
    """Return the gradient of pre [R, 2F], the weighted activation [R, F], and the gradient of row_weights [R] fp32."""
    grad_pre, act, grad_weights = exact_swiglu_backward(grad_act, pre, row_weights)
    return quantize_rows(grad_pre), quantize_rows(act), grad_weights


def exact_swiglu_backward(
    grad_act: torch.Tensor, pre: torch.Tensor, row_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same in fp32."""
    gate, up = pre.float().chunk(2, -1)
    grad, sigmoid = grad_act.float(), gate.sigmoid()
    silu = gate * sigmoid
    act = silu * up
    grad_weights = (grad * act).sum(-1)
    grad, act = grad * row_weights.unsqueeze(-1), act * row_weights.unsqueeze(-1)
    grad_pre = torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], -1)
    return grad_pre, act, grad_weights


def gated_forward(pre: torch.Tensor) -> Scaled:
    """Return silu(gate) * up [R, F], as :func:`moescale.kernels.swiglu.reference.swiglu` rounds it, in e4m3."""
    return quantize_rows(swiglu_in_bf16(pre))


def gated_backward(grad_act: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Scaled]:
    """Return that activation [R, F] and the gradient of pre [R, 2F] in bf16, and the latter in e4m3."""
    gate, up = pre.chunk(2, -1)
    of_gate = torch.ops.aten.silu_backward(grad_act * up, gate)
    grad_pre = torch.cat([of_gate, grad_act * F.silu(gate)], -1)
    return swiglu_in_bf16(pre), grad_pre, quantize_rows(grad_pre)


def pad_ends(ends: torch.Tensor) -> torch.Tensor:
    """Return the ends [E] of the experts' columns in transposed copies: each expert's a multiple of 128."""
    sizes = ends.diff(prepend=ends.new_zeros(1))
    return (-(-sizes // FP8_COPY_ROWS) * FP8_COPY_ROWS).cumsum(0).to(ends.dtype)


def transpose_rows(
    rows: Scaled, groups: torch.Tensor, padded: torch.Tensor, *, row_pair: torch.Tensor | None = None, top_k: int = 0
) -> Scaled:
    """Return rows [R, C] with scales [R] as [C, P] with scales [E]; with ``row_pair`` those of tokens."""
    values = rows.data.float() * rows.scales.unsqueeze(-1)
    scales = rows.scales
    if row_pair is not None:
        values, scales = values[row_pair // top_k], scales[row_pair // top_k]
    bounds, columns = [0, *groups.tolist()], [0, *padded.tolist()]
    found = torch.full((len(bounds) - 1,), LEAST_SCALE, device=values.device)
    out = torch.zeros((values.shape[1], columns[-1]), device=values.device)
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > first:
            found[expert] = scales[first:end].amax().clamp(min=LEAST_SCALE)
            out[:, columns[expert] : columns[expert] + end - first] = (values[first:end] / found[expert]).T
    return Scaled(out.to(E4M3), found)


def multiply_rows(
    rows: Scaled,
    weight: Scaled,
    groups: torch.Tensor,
    num_columns: int,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Return rows [R, K] times the weight of their expert as [R, N] bf16; rows of no expert are zero.

    Weight: [E, N, K] with scales [E], or ``transposed``, [N, E * K'] with K' >= K.
    """
    k, num_experts = rows.data.shape[1], groups.numel()
    matrices = weight.data.float()
    if transposed:
        matrices = matrices.view(num_columns, num_experts, -1).transpose(0, 1)[..., :k]
    matrices = matrices * weight.scales.view(-1, 1, 1)
    values = rows.data.float() * rows.scales.unsqueeze(-1)
    out = torch.zeros((values.shape[0], num_columns), device=values.device)
    first = 0
    for matrix, end in zip(matrices, groups.tolist(), strict=True):
        out[first:end] = values[first:end] @ matrix.T
        first = end
    return out.bfloat16()


def weight_gradient(
    left: Scaled, right: Scaled, padded: torch.Tensor, *, buffer: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum over each expert's rows of left [M, P] @ right [N, P].T, [E, M, N] bf16, or add to ``buffer``."""
    parts, first = [], 0
    for expert, end in enumerate(padded.tolist()):
        scale = left.scales[expert] * right.scales[expert]
        parts.append(left.data[:, first:end].float() @ right.data[:, first:end].float().T * scale)
        first = end
    found = torch.stack(parts)
    return found.bfloat16() if buffer is None else buffer.add_(found.to(buffer.dtype))


def write_copies(weight: torch.Tensor, largest: torch.Tensor, copies: Copies) -> None:
    """Quantise weight [E, N, K] into its copies. ``largest`` [E] fp32: each expert's largest absolute element."""
    num_experts, n, k = weight.shape
    copies.scales.copy_(power_of_two_scale(largest))
    codes = (weight.float() / copies.scales.view(-1, 1, 1)).to(E4M3)
    copies.rows.copy_(codes)
    columns = copies.columns.view(torch.uint8).view(k, num_experts, -1)
    columns.zero_()
    columns[..., :n] = codes.view(torch.uint8).permute(2, 0, 1)


__all__ = [
    "combine_rows",
    "gated_backward",
    "gated_forward",
    "gather_rows",
    "gather_scaled",
    "group_rows",
    "multiply_rows",
    "order_by_pair",
    "pad_ends",
    "quantize_rows",
    "sort_pairs",
    "sort_weights",
    "swiglu",
    "swiglu_backward",
    "transpose_rows",
    "weight_gradient",
    "write_copies",
]
