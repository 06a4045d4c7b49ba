"""Grouped GEMM on rows sorted by expert: one matrix product per expert, ragged in the number of rows."""

from __future__ import annotations

import torch

from moescale.kernels.backends import (
    KernelInputError,
    check_device,
    check_dtype,
    check_gradient_buffer,
    check_shape,
    choose_backend,
)


def grouped_gemm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    *,
    weight_gradient: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return ``rows[r] @ weight[e].T`` for every row r of expert e.

    Shapes: rows [R, K] sorted by expert; weight [E, N, K]; ends [E] int32, the cumulative row count of each expert;
    result [R, N]. Rows from ``ends[-1]`` on belong to no expert: their result and their gradient are zero.
    Differentiable in rows and weight. With ``weight_gradient`` (the weight's shape; its dtype or fp32) the backward
    adds the weight's gradient to that buffer and leaves ``weight.grad`` untouched.

    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    check_shape("grouped_gemm", "weight", weight, (None, None, None), "[E, N, K]")
    num_experts, n, k = weight.shape
    check_shape("grouped_gemm", "rows", rows, (None, k), "[R, K]")
    check_shape("grouped_gemm", "ends", ends, (num_experts,), "[E]")
    check_dtype("grouped_gemm", "ends", ends, (torch.int32,))
    check_dtype("grouped_gemm", "rows", rows, (torch.float32, torch.bfloat16, torch.float16))
    check_dtype("grouped_gemm", "weight", weight, (rows.dtype,))
    check_device("grouped_gemm", "weight", weight, rows.device)
    check_device("grouped_gemm", "ends", ends, rows.device)
    backend = choose_backend(rows.device, rows.dtype, backend)
    multiple = 16 // rows.dtype.itemsize
    if backend != "torch" and (n % multiple or k % multiple):
        raise KernelInputError(
            f"grouped_gemm: weight dims N ({n}) and K ({k}) must be multiples of {multiple} in {rows.dtype} for the "
            f"back end {backend!r}; use the back end 'torch'"
        )
    if weight_gradient is not None:
        check_gradient_buffer("grouped_gemm", "weight", weight, weight_gradient)
    return _grouped_gemm(rows, weight, ends, weight_gradient, backend)


@torch.library.custom_op("moescale::grouped_gemm", mutates_args=())
def _grouped_gemm(
    rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, weight_gradient: torch.Tensor | None, backend: str
) -> torch.Tensor:
    if backend == "triton":
        from moescale.kernels import grouped_gemm_triton as triton_gemm
        from moescale.kernels.row_tiles_triton import group_rows

        groups = group_rows(ends, rows.shape[0])
        return triton_gemm.multiply_rows(rows.contiguous(), weight.contiguous(), groups, zero_tail=True)
    from moescale.kernels import experts_unfused

    return experts_unfused.multiply_rows(rows, weight, ends, zero_tail=True, backend=backend)


@_grouped_gemm.register_fake
def _(rows, weight, ends, weight_gradient, backend):
    return rows.new_empty((rows.shape[0], weight.shape[1]))


# The mutation of ``buffer`` is left undeclared on purpose: see the module docstring of experts.py.
@torch.library.custom_op("moescale::grouped_gemm_backward", mutates_args=())
def _grouped_gemm_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    buffer: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, rows, weight = grad.contiguous(), rows.contiguous(), weight.contiguous()
    buffer = None if buffer is None else buffer.data
    if backend == "triton":
        from moescale.kernels import grouped_gemm_triton as triton_gemm
        from moescale.kernels.row_tiles_triton import group_rows

        groups = group_rows(ends, rows.shape[0])
        grad_rows = triton_gemm.multiply_rows(grad, weight, groups, transposed=True, zero_tail=True, kernel="up_dgrad")
        grad_weight = triton_gemm.weight_gradient(grad, rows, groups, buffer=buffer)
    else:
        from moescale.kernels import experts_unfused

        grad_rows = experts_unfused.multiply_rows(grad, weight, ends, transposed=True, zero_tail=True, backend=backend)
        grad_weight = experts_unfused.weight_gradient(grad, rows, ends, buffer=buffer, backend=backend)
    return grad_rows, grad_weight if buffer is None else rows.new_empty(0)


@_grouped_gemm_backward.register_fake
def _(grad, rows, weight, ends, buffer, backend):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return rows.new_empty(rows.shape), grad_weight if buffer is None else rows.new_empty(0)


def _setup(ctx, inputs, output) -> None:
    rows, weight, ends, ctx.weight_gradient, ctx.backend = inputs
    ctx.save_for_backward(rows, weight, ends)


def _autograd(ctx, grad):
    grad_rows, grad_weight = _grouped_gemm_backward(grad, *ctx.saved_tensors, ctx.weight_gradient, ctx.backend)
    return grad_rows, grad_weight if ctx.weight_gradient is None else None, None, None, None


_grouped_gemm.register_autograd(_autograd, setup_context=_setup)
