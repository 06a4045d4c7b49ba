"""The router: which experts each token goes to, with which weights, and the load-balancing loss.

Sources: DeepSeek-V2 (arXiv:2405.04434, sections 2.1.2 and 2.2.2) and its published modelling code, where a softmax runs
over all experts before group limiting; DeepSeek-V3 (arXiv:2412.19437, section 2.1.2, equations 12 to 20), where scores
are sigmoids and a bias per expert, which no gradient trains, takes part in the choice alone. Gradients flow through the
scores only, never through the choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from moescale.kernels.backends import KernelInputError, check_dtype, check_shape, runs_triton
from moescale.kernels.router import reference
from moescale.kernels.router.reference import Routing


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weight.T`` in fp32: products of bf16 inputs are exact, sums are fp32.

    Shapes: x [T, H]; weight [E, H]; result [T, E] fp32. On CUDA in bf16 no fp32 copy of x or weight is made, and the
    gradient keeps 16 bits of mantissa.
    """
    check_shape("router_logits", "x", x, (None, None), "[T, H]")
    check_shape("router_logits", "weight", weight, (None, x.shape[1]), "[E, H]")
    check_dtype("router_logits", "weight", weight, (x.dtype,))
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        return _router_logits_op(x, weight)
    return F.linear(x.float(), weight.float())


def route(
    logits: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    top_k: int,
    group_limited: bool,
    normalize_topk: bool,
    routed_scaling_factor: float,
    num_sequences: int | None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    backend: str = "auto",
) -> Routing:
    """Choose ``top_k`` experts per token from ``logits`` [T, E] fp32.

    ``group_limited`` first keeps the ``top_k_groups`` groups (of E / num_groups neighbouring experts) with the highest
    maximum. With ``normalize_topk`` and top_k > 1 the weights are divided by their sum, otherwise multiplied by
    ``routed_scaling_factor``. The auxiliary loss balances the T tokens as a whole, or each of ``num_sequences`` equal
    sequences by itself and is then their mean. Nothing synchronises with the host.

    With ``bias`` [E] fp32 scores are sigmoids of the logits and the choice is by score plus bias, the score of a group
    the sum of its two best. The weights are the scores, with ``normalize_topk`` divided by their sum, *and* multiplied
    by ``routed_scaling_factor``. The auxiliary loss is of each token's scores, divided by their sum over all experts,
    and of the experts that have its ``top_k`` highest scores. ``counted`` [T] bool: the tokens that ``load`` is of.

    ``padding`` [T] bool: tokens that only fill a sequence. They are routed, but neither ``load`` nor the auxiliary loss
    knows of them: a sequence is balanced over the tokens of its text, and one without text adds 0 to the mean.
    """
    if not group_limited:
        num_groups = top_k_groups = 1
    sequences = 1 if num_sequences is None else num_sequences
    _check(logits, top_k, num_groups, top_k_groups, sequences)
    if bias is not None:
        check_shape("route", "bias", bias, (logits.shape[1],), "[E]")
        check_dtype("route", "bias", bias, (torch.float32,))
    for name, marks in (("counted", counted), ("padding", padding)):
        if marks is not None:
            check_shape("route", name, marks, (logits.shape[0],), "[T]")
            check_dtype("route", name, marks, (torch.bool,))
    normalize = normalize_topk and (top_k > 1 or bias is not None)
    choice = (top_k, num_groups, top_k_groups, normalize, routed_scaling_factor, sequences)
    arguments = (logits, bias, counted, padding, *choice)
    if runs_triton(logits.device, logits.dtype, backend):
        ids, weights, rows, loss, _ = _route_op(*arguments)
        return Routing(ids, weights, rows[0], loss, rows[1])
    return reference.route(*arguments)


def _check(logits: torch.Tensor, top_k: int, num_groups: int, top_k_groups: int, num_sequences: int) -> None:
    check_shape("route", "logits", logits, (None, None), "[T, E]")
    check_dtype("route", "logits", logits, (torch.float32,))
    num_tokens, num_experts = logits.shape
    if num_experts % num_groups or not 1 <= top_k_groups <= num_groups:
        raise KernelInputError(
            f"route: {num_experts} experts, num_groups ({num_groups}), top_k_groups ({top_k_groups}): groups must "
            "divide the experts, and 1 to num_groups of them be kept"
        )
    reachable = num_experts // num_groups * top_k_groups
    if not 1 <= top_k <= reachable:
        raise KernelInputError(f"route: top_k ({top_k}) must be between 1 and the {reachable} reachable experts")
    if num_sequences < 1 or num_tokens % num_sequences:
        raise KernelInputError(f"route: num_sequences ({num_sequences}) must divide the {num_tokens} tokens")


@custom_op("moescale::route", mutates_args=())
def _route_op(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    counted: torch.Tensor | None,
    padding: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    normalize: bool,
    scaling: float,
    num_sequences: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from moescale.kernels.router import triton

    return triton.forward(
        logits.contiguous(), bias, counted, padding,
        top_k, num_groups, top_k_groups, normalize, scaling, num_sequences,
    )  # fmt: skip


@_route_op.register_fake
def _(logits, bias, counted, padding, top_k, num_groups, top_k_groups, normalize, scaling, num_sequences):
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty((num_tokens, top_k)),
        logits.new_empty((2, num_experts), dtype=torch.int32),
        logits.new_empty(()),
        logits.new_empty((num_sequences, num_experts), dtype=torch.int32),
    )


@custom_op("moescale::route_backward", mutates_args=())
def _route_backward_op(
    grad_weights: torch.Tensor,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    padding: torch.Tensor | None,
    normalize: bool,
    scaling: float,
    by_sigmoid: bool,
) -> torch.Tensor:
    from moescale.kernels.router import triton

    return triton.backward(
        grad_weights, grad_loss, logits.contiguous(), ids, counts, padding, normalize, scaling, by_sigmoid
    )


@_route_backward_op.register_fake
def _(grad_weights, grad_loss, logits, ids, counts, padding, normalize, scaling, by_sigmoid):
    return logits.new_empty(logits.shape)


def _save_route(ctx, inputs, output):
    logits, bias, _, padding, _, _, _, ctx.normalize, ctx.scaling, _ = inputs
    ctx.by_sigmoid = bias is not None
    ids, _, _, _, counts = output
    ctx.save_for_backward(logits, ids, counts, padding)


def _route_backward(ctx, grad_ids, grad_weights, grad_rows, grad_loss, grad_counts):
    grad = _route_backward_op(grad_weights, grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.scaling, ctx.by_sigmoid)
    return grad, *(None,) * 9


_route_op.register_autograd(_route_backward, setup_context=_save_route)


@custom_op("moescale::router_logits", mutates_args=())
def _router_logits_op(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@_router_logits_op.register_fake
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


@custom_op("moescale::router_logits_backward", mutates_args=())
def _router_logits_backward_op(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Two bf16 halves carry 16 bits of the fp32 gradient through the tensor cores, side by side in one product.
    high = grad.to(torch.bfloat16)
    low = (grad - high).to(torch.bfloat16)
    halves = torch.cat([high, low], dim=1)  # [T, 2E]
    grad_x = torch.mm(halves, torch.cat([weight, weight]))
    both = torch.mm(halves.t(), x, out_dtype=torch.float32)  # [2E, H]
    return grad_x, (both[: weight.shape[0]] + both[weight.shape[0] :]).to(weight.dtype)


@_router_logits_backward_op.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_logits(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _logits_backward(ctx, grad):
    return _router_logits_backward_op(grad, *ctx.saved_tensors)


_router_logits_op.register_autograd(_logits_backward, setup_context=_save_logits)
