"""The functions that make up the expert MLP, by back end."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from moescale.kernels.backends import check_gradient_buffer
from moescale.kernels.experts import reference


def operators_of(backend: str) -> SimpleNamespace:
    """Return the functions that make up the operator in a back end, with one signature."""
    if backend in ("triton", "cute"):
        module = importlib.import_module(f"moescale.kernels.experts.{backend}")
        return SimpleNamespace(**{name: getattr(module, name) for name in module.__all__})
    bind = functools.partial
    return SimpleNamespace(
        add_bias_products=reference.add_bias_products,
        bias_gradient=reference.bias_gradient,
        combine_rows=reference.combine_rows,
        gather_rows=reference.gather_rows,
        group_rows=reference.group_rows,
        multiply_down_dgrad=bind(reference.multiply_down_dgrad, backend=backend),
        multiply_rows=bind(reference.multiply_rows, backend=backend),
        multiply_up=bind(reference.multiply_up, backend=backend),
        order_by_pair=reference.order_by_pair,
        sort_weights=reference.sort_weights,
        weight_gradient=bind(reference.weight_gradient, backend=backend),
    )


def empty_results(
    x: torch.Tensor, topk_ids: torch.Tensor, gate_up: torch.Tensor, save_pre: bool
) -> tuple[torch.Tensor, ...]:
    """What the experts' forward operators return, but for the numbers: (y, pre-activation, row_pair, pair_row, ends).

    The pre-activation is empty where it is not saved.
    """
    num_rows = topk_ids.numel()
    pre = x.new_empty((num_rows, gate_up.shape[1])) if save_pre else x.new_empty(0)
    order = [topk_ids.new_empty(n, dtype=torch.int32) for n in (num_rows, num_rows, gate_up.shape[0])]
    return torch.empty_like(x, memory_format=torch.contiguous_format), pre, *order


def check_gradient_buffers(
    operator: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
) -> None:
    """Raise KernelInputError unless the buffers fit the weights whose gradients are added to them."""
    for name, weight, buffer in (("gate_up", gate_up, gate_up_gradient), ("down", down, down_gradient)):
        if buffer is not None:
            check_gradient_buffer(operator, name, weight, buffer)


def returned(
    gradients: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor | None], needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """What autograd is handed of gradients: none that was added to its buffer, and none that is not asked for."""
    return [
        gradient if buffer is None and asked else None
        for gradient, buffer, asked in zip(gradients, buffers, needed, strict=True)
    ]
