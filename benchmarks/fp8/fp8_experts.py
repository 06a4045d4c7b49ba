"""The expert MLP, forward and backward, with its products in fp8: what is quantised where.

Forward: rows are quantised (with the gather: a token's row once), ``up`` writes the pre-activation in bf16, SwiGLU
writes its result in e4m3, ``down``. Backward: the gradient's rows are quantised likewise, ``down_dgrad``, SwiGLU's
backward writes e4m3, then ``up_dgrad`` and the two weight gradients: in fp8 from transposed copies of four tensors, or
in bf16 from the bf16 tensors. The router, the sort and the sum over a token's experts stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import fp8_quantise as quantise
from fp8_gemm import LARGE, Scaled, multiply_rows, weight_gradient
from moescale.kernels.experts import triton as bf16
from moescale.kernels.experts.launch_config import LaunchConfig
from moescale.kernels.experts.row_tiles_triton import RowGroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Both weights of the experts in fp8, as the forward takes them and as the gradient of rows does."""

    gate_up: Scaled
    down: Scaled
    gate_up_transposed: Scaled
    down_transposed: Scaled

    @classmethod
    def of(cls, gate_up: torch.Tensor, down: torch.Tensor, largest: tuple[torch.Tensor, torch.Tensor]) -> Weights:
        """Quantise gate_up [E, 2F, H] and down [E, H, F], whose :func:`largest_elements` are ``largest``."""
        gate_up_copies = quantise.quantise_weight(gate_up, largest[0])
        down_copies = quantise.quantise_weight(down, largest[1])
        return cls(
            gate_up=gate_up_copies[0],
            down=down_copies[0],
            gate_up_transposed=gate_up_copies[1],
            down_transposed=down_copies[1],
        )


def largest_elements(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest absolute elements of each expert's weights [E] fp32; in training, the optimizer's to know."""
    return tuple(weight.abs().amax((1, 2)).float() for weight in (gate_up, down))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of experts [R, H] in e4m3; where they were gathered, also the tokens [T, H]; bf16 for bf16 gradients."""

    scaled: Scaled
    tokens: torch.Tensor | None = None
    row_pair: torch.Tensor | None = None
    top_k: int = 0
    wide: torch.Tensor | None = None

    @classmethod
    def gathered(cls, x: torch.Tensor, row_pair: torch.Tensor, pair_row: torch.Tensor, top_k: int) -> Rows:
        """Quantise tokens x [T, H] and gather them."""
        scaled, tokens = quantise.gather_rows(x, pair_row, top_k)
        return cls(scaled=scaled, tokens=tokens, row_pair=row_pair, top_k=top_k)

    def transposed(self, ends: torch.Tensor, padded: torch.Tensor) -> Scaled:
        """Return the copy that a weight gradient contracts."""
        source = {"tokens": self.tokens, "row_pair": self.row_pair, "top_k": self.top_k}
        return quantise.transpose_rows(self.scaled, ends, padded, **source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the products are computed: launches and ``imprecise`` by product.

    ``weight_gradients``: "fp8", "bf16", or "none" for frozen weights.
    """

    weight_gradients: str = "fp8"
    launches: dict[str, LaunchConfig] = dataclasses.field(default_factory=dict)
    imprecise: dict[str, int] = dataclasses.field(default_factory=dict)

    def of(self, product: str) -> dict[str, Any]:
        """Return the arguments of one product."""
        return {"launch": self.launches.get(product, LARGE), "imprecise": self.imprecise.get(product, 0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What the backward takes from the forward: the pre-activation [R, 2F] is in bf16, as without fp8."""

    rows: Rows
    pre: torch.Tensor
    act: Scaled


def forward(rows: Rows, weights: Weights, groups: RowGroups, settings: Settings) -> tuple[torch.Tensor, Saved]:
    """Return the result [R, H] bf16 and what the backward needs."""
    hidden, ffn2 = rows.scaled.data.shape[1], weights.gate_up.data.shape[1]
    pre = multiply_rows(rows.scaled, weights.gate_up, groups, ffn2, **settings.of("up"))
    act = quantise.swiglu(pre)
    out = multiply_rows(act, weights.down, groups, hidden, **settings.of("down"))
    return out, Saved(rows=rows, pre=pre, act=act)


def backward(
    grad: Rows,
    saved: Saved,
    weights: Weights,
    groups: RowGroups,
    row_weights: torch.Tensor | None,
    settings: Settings,
) -> dict[str, torch.Tensor | None]:
    """Return the gradients of the rows [R, H], the row weights [R], and both weights, in bf16 and fp32.

    ``grad``: of the unweighted result. Weight gradients in bf16 take the bf16 rows of it and of what was saved.
    """
    hidden, ffn2 = grad.scaled.data.shape[1], saved.pre.shape[1]
    grad_act = multiply_rows(
        grad.scaled, weights.down_transposed, groups, ffn2 // 2, transposed=True, **settings.of("down_dgrad")
    )
    wide = settings.weight_gradients == "bf16"
    grad_down = grad_gate_up = None
    grad_pre, act, grad_weights, wide_grad_pre = quantise.swiglu_backward(grad_act, saved.pre, row_weights, wide=wide)
    if wide:
        grad_down = bf16.weight_gradient(grad.wide, grad_act, groups, kernel="down_wgrad")
        grad_gate_up = bf16.weight_gradient(wide_grad_pre, saved.rows.wide, groups, kernel="up_wgrad")
    elif settings.weight_gradients == "fp8":
        padded = quantise.pad_ends(groups.ends)
        act_transposed = quantise.transpose_rows(act or saved.act, groups.ends, padded)
        grad_transposed = grad.transposed(groups.ends, padded)
        grad_down = weight_gradient(grad_transposed, act_transposed, padded, **settings.of("down_wgrad"))
        pre_transposed = quantise.transpose_rows(grad_pre, groups.ends, padded)
        rows_transposed = saved.rows.transposed(groups.ends, padded)
        grad_gate_up = weight_gradient(pre_transposed, rows_transposed, padded, **settings.of("up_wgrad"))
    grad_rows = multiply_rows(
        grad_pre, weights.gate_up_transposed, groups, hidden, transposed=True, **settings.of("up_dgrad")
    )
    return {
        "grad_rows": grad_rows,
        "grad_weights": grad_weights,
        "grad_gate_up": grad_gate_up,
        "grad_down": grad_down,
    }
