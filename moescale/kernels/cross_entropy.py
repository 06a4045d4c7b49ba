"""Cross-entropy of a linear layer's logits, without ever holding a micro-batch's logits.

Tokens go through in chunks. Where gradients are wanted they are computed in the same pass, while a chunk's logits
exist; the backward then only multiplies by the incoming gradient (the method of Liger Kernel, arXiv:2410.10989). Within
a chunk the weight's gradient is summed in fp32; the sum over chunks is kept in the weight's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from moescale.kernels._elementwise import runs_triton
from moescale.kernels.backends import check_dtype, check_shape

# A chunk's logits are 2 * V bytes a token: 419 MB at 2,048 tokens and a vocabulary of 102,400, as much as the weight's
# gradient, which every chunk reads, rounds and writes once. So small chunks cost time, and many of them accuracy: after
# four sums in bf16 the weight's gradient has 1.6 times the error of a single product, after sixteen 2.8 times.
CHUNK_TOKENS = 2048
MOST_CHUNKS = 4


def chunk_tokens(num_tokens: int) -> int:
    """Tokens whose logits exist at one time."""
    return max(CHUNK_TOKENS, -(-num_tokens // MOST_CHUNKS))


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the sum over target tokens of ``-log softmax(hidden @ weight.T)[target]``, a scalar in fp32, in nats.

    Shapes: hidden [T, H]; weight [V, H]; targets [T] int64, ``ignore_index`` where a token has none.
    """
    check_shape("linear_cross_entropy", "hidden", hidden, (None, None), "[T, H]")
    check_shape("linear_cross_entropy", "weight", weight, (None, hidden.shape[1]), "[V, H]")
    check_shape("linear_cross_entropy", "targets", targets, (hidden.shape[0],), "[T]")
    check_dtype("linear_cross_entropy", "weight", weight, (hidden.dtype,))
    check_dtype("linear_cross_entropy", "targets", targets, (torch.int64,))
    # Without a gradient to come (validation, frozen weights) none is computed.
    wants_grad = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy_op(
        hidden,
        weight,
        targets,
        ignore_index,
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
    softmax_losses = _softmax_losses_triton if use_triton else _softmax_losses_torch
    size = chunk_tokens(len(targets))
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        logits = F.linear(hidden[chunk], weight)
        losses, grad_logits = softmax_losses(logits, targets[chunk], ignore_index, wants_hidden or wants_weight)
        loss += losses.sum()
        if wants_hidden:
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
        if wants_weight:
            _accumulate_product(grad_weight, grad_logits.t(), hidden[chunk], is_first=start == 0)
    return loss, grad_hidden, grad_weight


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, wants_hidden, wants_weight, use_triton):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


def _softmax_losses_triton(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from moescale.kernels import _cross_entropy_triton

    losses = _cross_entropy_triton.softmax_losses(logits, targets.contiguous(), ignore_index, wants_grad)
    return losses, logits


def _softmax_losses_torch(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    is_target = targets != ignore_index
    ids = targets.where(is_target, 0).unsqueeze(1)
    log_probabilities = logits.float().log_softmax(-1)
    losses = -log_probabilities.gather(1, ids).squeeze(1) * is_target
    if not wants_grad:
        return losses, logits
    gradient = log_probabilities.exp_().scatter_add_(1, ids, -torch.ones_like(ids, dtype=torch.float32))
    return losses, (gradient * is_target.unsqueeze(1)).to(logits.dtype)


def _accumulate_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, is_first: bool) -> None:
    """``total (+)= a @ b``, added in the product's epilogue and rounded once."""
    if is_first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


@custom_op("moescale::scale_gradient", mutates_args=())
def _scale_gradient_op(
    gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, use_triton: bool
) -> torch.Tensor:
    if use_triton:
        from moescale.kernels import _cross_entropy_triton

        return _cross_entropy_triton.scaled(gradient, scale, dtype)
    return torch.mul(gradient.float(), scale).to(dtype)


@_scale_gradient_op.register_fake
def _(gradient, scale, dtype, use_triton):
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _save(ctx, inputs, output):
    hidden, _, _, _, ctx.wants_hidden, ctx.wants_weight, ctx.use_triton = inputs
    _, grad_hidden, grad_weight = output
    ctx.dtype = hidden.dtype
    # Nobody differentiates the gradients again: without this, zeros of their size would be made in the backward.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _backward(ctx, grad_loss, _grad_grad_hidden, _grad_grad_weight):
    if grad_loss is None:
        return (None,) * 7
    grad_hidden, grad_weight = ctx.saved_tensors
    return (
        _scale_gradient_op(grad_hidden, grad_loss, ctx.dtype, ctx.use_triton) if ctx.wants_hidden else None,
        _scale_gradient_op(grad_weight, grad_loss, ctx.dtype, ctx.use_triton) if ctx.wants_weight else None,
        *(None,) * 5,
    )


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)
