"""Dispatch between GPUs of one host without the host: ranks read each other's rows through symmetric memory.

Four barriers a layer and micro-batch, and the reason why one set of buffers serves all layers:

    forward   publish tokens and routing | A | pull rows, experts write results        | B | combine peers' results
    backward  publish tokens, gradients  | C | pull both, experts write rows' gradients | D | combine them

What peers read between A and B, ranks overwrite after B (or D) at the earliest, when they publish again. What they read
after B is overwritten by the experts of the next layer, after the next A, which no rank passes before all have
combined. No size depends on the host and nothing is a collective, so a micro-batch is one CUDA graph.

Rows are pulled again in the backward, not saved: 16 MB a layer over the link at 4,096 tokens, against 100 MB of memory.
Where the experts multiply in fp8, tokens and gradients are published in e4m3, and half the bytes are pulled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.autograd.function import once_differentiable

from moescale.kernels.backends import KernelInputError, choose_experts_backend, debug_checks_enabled
from moescale.kernels.block_fp8 import stored
from moescale.kernels.dispatch.buffers import ExchangeBuffers, ExchangeShape, PeerTensor
from moescale.kernels.experts import ExpertBiases, operators_of
from moescale.kernels.experts.adapted import ExpertAdapters, Projected, choose_adapted_backend
from moescale.kernels.experts.operators import returned
from moescale.kernels.experts.sort import check_ids, sort_pairs
from moescale.kernels.fp8 import kernels_for
from moescale.kernels.fp8.scaled import Copies, Scaled
from moescale.kernels.router import Routing
from moescale.models.blocks.moe import RoutedExperts
from moescale.models.blocks.norm import Activation, plain_of, rows_of
from moescale.plan import SAVED_ROWS_FACTOR

if TYPE_CHECKING:  # kernels are imported where they run
    from moescale.kernels.dispatch.triton import RowOrder


class PeerDispatcher:
    """The dispatcher of all MoE layers of a rank, whose group's GPUs read each other's memory."""

    is_recordable = True
    moves_rows_in_fp8 = True

    def __init__(self, shape: ExchangeShape, group: dist.ProcessGroup, device: torch.device) -> None:
        """Allocate the buffers and exchange their addresses: a collective of ``group``."""
        block = symmetric_memory.empty(shape.num_bytes, dtype=torch.uint8, device=device)
        self._memory = symmetric_memory.rendezvous(block, group)
        self.buffers = ExchangeBuffers.carve(shape, group.rank(), block, self._memory.buffer_ptrs)
        self.num_ranks = shape.num_ranks
        self.saved_rows = min(shape.max_rows, math.ceil(SAVED_ROWS_FACTOR * shape.num_pairs))

    def publish(
        self, x: torch.Tensor, shown: PeerTensor, scales: PeerTensor | None, rows: Scaled | None = None
    ) -> None:
        """Write x [T, H] to where peers read it: as it is, or in e4m3 with ``scales``, of which ``rows`` is a copy."""
        local = shown.local[: x.shape[0]]
        if scales is None:
            local.copy_(x)
        elif rows is None:
            kernels_for(x).quantize_rows(x.contiguous(), out=Scaled(local, scales.local[: x.shape[0]]))
        else:
            local.copy_(rows.data)
            scales.local[: x.shape[0]].copy_(rows.scales)

    def pull(self, shown: PeerTensor, scales: PeerTensor | None, order: RowOrder) -> Any:
        """Return the rows [C, H] of this rank's experts of what all ranks have published."""
        from moescale.kernels.dispatch import triton as exchange

        sizes, results = self.buffers.results.local.shape, self.buffers.results.local
        if scales is None:
            return exchange.pull_rows(self.buffers, shown, order, results.new_empty(sizes))
        empty = kernels_for(results).empty_rows(*sizes, results.device)
        return exchange.pull_scaled_rows(self.buffers, shown, scales, order, empty)

    def barrier(self) -> None:
        """Have the device wait until all ranks of the group have come to this barrier."""
        self._memory.barrier(channel=0)

    @torch.compiler.disable
    def __call__(
        self,
        experts: RoutedExperts,
        x: Activation,
        routing: Routing,
        overlapped: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        """As :class:`moescale.models.blocks.moe.Dispatcher`.

        Raises KernelInputError for more tokens than there is room for.
        """
        x, rows = plain_of(x), rows_of(x)
        shape = self.buffers.shape
        if x.shape[0] > shape.num_tokens:
            raise KernelInputError(
                f"experts: {x.shape[0]} tokens exceed the {shape.num_tokens} for which ranks have set buffers aside; "
                "give the plan's micro-batch, or a smaller one"
            )
        if debug_checks_enabled():
            check_ids(routing.topk_ids, shape.num_experts, routing.tokens_per_expert)
        addition = None if experts.adapter is None else experts.adapter.arguments(x)
        adapters = () if addition is None else addition["adapters"]
        out = _PeerExperts.apply(
            x,
            routing.topk_weights,
            experts.gate_up,
            experts.down,
            experts.gate_up_bias,
            experts.down_bias,
            routing.topk_ids,
            self,
            experts,
            rows,
            addition,
            *adapters,
        )
        return out if overlapped is None else out + overlapped()


class _PeerExperts(torch.autograd.Function):
    """The routed experts of a layer, forward and backward, as the module's docstring lays out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        topk_ids: torch.Tensor,
        dispatcher: PeerDispatcher,
        experts: RoutedExperts,
        quantized: Scaled | None,
        addition: dict[str, Any] | None,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        """``quantized``: x in e4m3, where that is there already. ``addition``: as of
        :meth:`moescale.models.blocks.moe.Adapter.arguments`, its ``adapters`` once more.
        """
        from moescale.kernels.dispatch import fp8_mlp, mlp
        from moescale.kernels.dispatch import triton as exchange

        buffers, shape = dispatcher.buffers, dispatcher.buffers.shape
        biases = None if gate_up_bias is None or down_bias is None else ExpertBiases(gate_up_bias, down_bias)
        copies: tuple[Copies, Copies] | None = None
        if shape.in_fp8:
            assert experts.gate_up_copies is not None and experts.down_copies is not None
            copies = experts.gate_up_copies, experts.down_copies
        if copies is not None:
            backend = "triton"
        elif addition is None:
            backend = choose_experts_backend(x.device, x.dtype, experts.backend)
        else:
            backend = choose_adapted_backend(x.device, x.dtype, experts.backend)
        ops: Any = operators_of(backend) if copies is None else kernels_for(x)
        needs_backward = any(ctx.needs_input_grad)
        kept = dispatcher.saved_rows if needs_backward and not experts.recompute_up else 0
        topk_weights = topk_weights.contiguous()
        _, pair_rows, ends = sort_pairs(topk_ids, shape.num_experts, backend=backend)
        exchange.publish_pairs(buffers, topk_ids, topk_weights, pair_rows, ends)
        dispatcher.publish(x, buffers.tokens, buffers.token_scales, quantized)
        dispatcher.barrier()
        order = exchange.order_rows(buffers, kept_rows=kept)
        rows = dispatcher.pull(buffers.tokens, buffers.token_scales, order)
        options: Any = dict(kept=kept, expected_rows=shape.num_pairs, out=buffers.results.local)
        projected = None
        if copies is not None:
            pre = fp8_mlp.forward_rows(ops, rows, *copies, order, **options)
        else:
            factors = None if addition is None else ExpertAdapters(*adapters).for_rows(x.dtype, addition["scale"])
            pre, projected = mlp.forward_rows(
                ops,
                rows,
                stored(gate_up, experts.gate_up_scale),
                stored(down, experts.down_scale),
                order,
                factors=factors,
                biases=biases,
                clamp=experts.clamp,
                **options,
            )
        del rows
        dispatcher.barrier()
        out = exchange.pull_sums(buffers, order, x.shape[0], topk_weights)
        if needs_backward:
            ctx.save_for_backward(x, gate_up, down, gate_up_bias, down_bias, pre, *(projected or ()), *adapters)
            ctx.addition = None if addition is None else (addition["scale"], addition["gradients"] or (None,) * 4)
            ctx.order, ctx.dispatcher, ctx.ops = order, dispatcher, ops
            ctx.copies, ctx.scales = copies, (experts.gate_up_scale, experts.down_scale)
            ctx.gradient_buffers = (experts.gate_up_gradient, experts.down_gradient, experts.bias_gradients)
            ctx.clamp = experts.clamp
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from moescale.kernels.dispatch import fp8_mlp, mlp
        from moescale.kernels.dispatch import triton as exchange

        x, gate_up, down, gate_up_bias, down_bias, pre, *adapted = ctx.saved_tensors
        dispatcher, order = ctx.dispatcher, ctx.order
        buffers = dispatcher.buffers
        num_tokens = x.shape[0]
        dispatcher.publish(x, buffers.tokens, buffers.token_scales)
        dispatcher.publish(grad, buffers.gradients, buffers.gradient_scales)
        dispatcher.barrier()
        rows = dispatcher.pull(buffers.tokens, buffers.token_scales, order)
        grad_rows = dispatcher.pull(buffers.gradients, buffers.gradient_scales, order)
        given = (stored(gate_up, ctx.scales[0]), stored(down, ctx.scales[1]), order)
        options: Any = dict(
            expected_rows=buffers.shape.num_pairs, out=buffers.results.local, values=buffers.values.local
        )
        of_weights: tuple[torch.Tensor | None, ...] = (None,) * 4
        of_adapters: list[torch.Tensor | None] = []
        if ctx.copies is not None:
            into = ctx.gradient_buffers[:2]
            weights: tuple[Copies, Copies] = ctx.copies
            made = fp8_mlp.backward_rows(ctx.ops, rows, grad_rows, pre, *weights, order, buffers=into, **options)
            of_weights = (*returned(made, into, ctx.needs_input_grad[2:4]), None, None)
        elif ctx.addition is not None:
            scale, gradients = ctx.addition
            found = mlp.backward_adapted_rows(
                ctx.ops,
                rows,
                grad_rows,
                pre,
                Projected(*adapted[:2]),
                *given,
                factors=ExpertAdapters(*adapted[2:]).for_rows(x.dtype, scale),
                buffers=gradients,
                scale=scale,
                **options,
            )
            of_adapters = [g if buffer is None else None for g, buffer in zip(found, gradients, strict=True)]
        else:
            of_weights = mlp.backward_rows(
                ctx.ops,
                rows,
                grad_rows,
                pre,
                *given,
                gate_up_gradient=ctx.gradient_buffers[0],
                down_gradient=ctx.gradient_buffers[1],
                biases=None if gate_up_bias is None else ExpertBiases(gate_up_bias, down_bias),
                bias_gradients=ctx.gradient_buffers[2],
                clamp=ctx.clamp,
                is_frozen=not any(ctx.needs_input_grad[2:6]),
                **options,
            )
        del rows, grad_rows
        dispatcher.barrier()
        grad_x = exchange.pull_sums(buffers, order, num_tokens)
        grad_weights = exchange.pull_values(buffers, order, num_tokens)
        return grad_x, grad_weights, *of_weights, *(None,) * 5, *of_adapters


def peers_are_readable(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Find out whether the GPUs of all ranks of ``group`` can read each other's memory. A collective of ``group``."""
    if device.type != "cuda":
        return False
    mine = (os.uname().nodename, _boot_id(), device.index)
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, mine, group=group)
    same_host = len({place[:2] for place in places}) == 1
    others = [place[2] for place in places if place[2] != device.index]
    readable = same_host and all(
        number < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device, number) for number in others
    )
    answers: list[Any] = [None] * group.size()
    dist.all_gather_object(answers, readable, group=group)
    return all(answers)


def _boot_id() -> str:
    """Tells hosts of the same name apart."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
