"""Cross-entropy of a linear layer's logits, without ever holding a micro-batch's logits.

Tokens go through in chunks. Where gradients are wanted they are computed in the same pass, while a chunk's logits
exist; the backward then only multiplies by the incoming gradient (the method of Liger Kernel, arXiv:2410.10989). Within
a chunk the weight's gradient is summed in fp32; the sum over chunks is kept in the weight's dtype. Where there is a
buffer for it, the backward adds it there as it multiplies, in one pass (see :mod:`moescale.kernels.experts`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from moescale.formats import logit_chunk_tokens
from moescale.kernels.backends import check_dtype, check_gradient_buffer, check_shape, runs_triton
from moescale.kernels.cross_entropy import reference


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    *,
    weight_gradient: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the sum over target tokens of ``-log softmax(hidden @ weight.T)[target]``, a scalar in fp32, in nats.

    Shapes: hidden [T, H]; weight [V, H]; targets [T] int64, ``ignore_index`` where a token has none.
    With ``weight_gradient``, a buffer as in :func:`moescale.kernels.linear.linear`, ``weight.grad`` stays untouched.
    """
    check_shape("linear_cross_entropy", "hidden", hidden, (None, None), "[T, H]")
    check_shape("linear_cross_entropy", "weight", weight, (None, hidden.shape[1]), "[V, H]")
    check_shape("linear_cross_entropy", "targets", targets, (hidden.shape[0],), "[T]")
    check_dtype("linear_cross_entropy", "weight", weight, (hidden.dtype,))
    check_dtype("linear_cross_entropy", "targets", targets, (torch.int64,))
    # Without a gradient to come (validation, frozen weights) none is computed.
    wants_grad = torch.is_grad_enabled()
    if weight_gradient is not None:
        check_gradient_buffer("linear_cross_entropy", "weight", weight, weight_gradient)
    loss, _, _ = _linear_cross_entropy_op(
        hidden,
        weight,
        targets,
        ignore_index,
        # A compiled backward would leave out an operator that returns nothing it needs.
        weight_gradient if hidden.requires_grad else None,
        wants_grad and hidden.requires_grad,
        wants_grad and weight.requires_grad,
        runs_triton(hidden.device, hidden.dtype, backend),
    )
    return loss


@custom_op("moescale::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    weight_gradient: torch.Tensor | None,
    wants_hidden: bool,
    wants_weight: bool,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss and, where wanted (else empty), the gradients of hidden and weight."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if wants_weight else (0,))
    if wants_weight and not len(targets):
        grad_weight.zero_()
    softmax_losses = _softmax_losses_triton if use_triton else reference.softmax_losses
    size = logit_chunk_tokens(len(targets))
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        logits = F.linear(hidden[chunk], weight)
        losses, grad_logits = softmax_losses(logits, targets[chunk], ignore_index, wants_hidden or wants_weight)
        loss += losses.sum()
        if wants_hidden:
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
        if wants_weight:
            _accumulate_product(grad_weight, grad_logits.t(), hidden[chunk], is_first=start == 0)
        del logits, grad_logits  # before the next chunk's are made: they are the largest tensors here
    return loss, grad_hidden, grad_weight


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, weight_gradient, wants_hidden, wants_weight, use_triton):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


def _softmax_losses_triton(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from moescale.kernels.cross_entropy import triton

    losses = triton.softmax_losses(logits, targets.contiguous(), ignore_index, wants_grad)
    return losses, logits


def _accumulate_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, is_first: bool) -> None:
    """``total (+)= a @ b``, added in the product's epilogue."""
    if is_first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


@custom_op("moescale::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward_op(
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor,
    scale: torch.Tensor,
    weight_gradient: torch.Tensor | None,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both gradients times ``scale``; that of a weight with a buffer is added there, and empty in the result."""
    scaled, add_scaled = reference.scaled, reference.add_scaled
    if use_triton:
        from moescale.kernels.cross_entropy import triton

        scaled, add_scaled = triton.scaled, triton.add_scaled
    grad_hidden = scaled(grad_hidden, scale)
    if weight_gradient is None:
        return grad_hidden, scaled(grad_weight, scale)
    add_scaled(weight_gradient.data, grad_weight, scale)
    return grad_hidden, grad_weight.new_empty(0)


@_linear_cross_entropy_backward_op.register_fake
def _(grad_hidden, grad_weight, scale, weight_gradient, use_triton):
    return (
        grad_hidden.new_empty(grad_hidden.shape),
        grad_weight.new_empty(grad_weight.shape if weight_gradient is None else (0,)),
    )


def _save(ctx, inputs, output):
    _, _, _, _, ctx.weight_gradient, ctx.wants_hidden, ctx.wants_weight, ctx.use_triton = inputs
    _, grad_hidden, grad_weight = output
    # Nobody differentiates the gradients again: without this, zeros of their size would be made in the backward.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _backward(ctx, grad_loss, _grad_grad_hidden, _grad_grad_weight):
    if grad_loss is None:
        return (None,) * 8
    buffer = ctx.weight_gradient if ctx.wants_weight else None
    grad_hidden, grad_weight = _linear_cross_entropy_backward_op(*ctx.saved_tensors, grad_loss, buffer, ctx.use_triton)
    return (
        grad_hidden if ctx.wants_hidden else None,
        grad_weight if ctx.wants_weight and buffer is None else None,
        *(None,) * 6,
    )


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)
