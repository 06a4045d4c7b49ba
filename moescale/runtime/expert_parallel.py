"""Expert parallelism: the routed experts of a layer, sharded over the P ranks of a group.

Rank r holds the experts [r * E / P, (r + 1) * E / P). Every row is dispatched to the rank of its expert, and its result
is combined on the rank of its token: two all-to-alls forward, and their mirror images backward. Rows have three orders:

- *slots*, the order of sending and receiving: by rank, then by expert;
- *rows*, the order of computing: by local expert, with the rows of all ranks together;
- *pairs* (token, k), the order of the result, which is summed over k in fp32, in the order of k.

An :class:`Exchange` decides the number of slots. All ranks take part in every collective, forward and backward, even a
rank without tokens and one whose experts no token chose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from moescale.kernels.backends import KernelInputError, choose_backend, debug_checks_enabled
from moescale.kernels.experts import expert_mlp
from moescale.kernels.experts.adapted import adapted_expert_mlp
from moescale.kernels.experts.sort import check_ids, sort_pairs
from moescale.kernels.fp8.rows import fp8_expert_mlp
from moescale.kernels.router import Routing
from moescale.models.blocks.moe import Dispatcher, MixtureOfExperts, RoutedExperts
from moescale.models.blocks.norm import Activation, plain_of
from moescale.models.registry import family_of
from moescale.models.transformer import Transformer
from moescale.plan import ParallelPlan, expert_shard_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotOrder:
    """Contents of the slots of one layer's exchange, on one rank with T tokens: S slots sent, Q received."""

    slot_pair: torch.Tensor
    """[S] int32: the pair whose row a slot carries; arbitrary in an empty slot."""
    pair_slot: torch.Tensor
    """[T * K] int32: the slot of every pair, -1 for a pair that is not sent."""
    slot_expert: torch.Tensor
    """[Q] int32: the local expert of every received slot, E / P in an empty slot."""
    sent: list[int] | None
    """Slots sent to each rank; None: the same number to every rank, and as many received."""
    received: list[int] | None
    """Slots received from each rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SortedPairs:
    """The pairs of T tokens sorted by expert, and therefore by rank; the numbers of rows that ranks send each other."""

    row_pair: torch.Tensor
    """[T * K] int32: the pair of every sorted row."""
    pair_row: torch.Tensor
    """[T * K] int32: the sorted row of every pair, -1 for an expert id that does not exist."""
    sent: torch.Tensor
    """[P, E / P] int32: rows this rank sends to each expert."""
    received: torch.Tensor
    """[P, E / P] int32: rows each rank sends to this rank's experts."""
    top_k: int


class Exchange(Protocol):
    """Decides how many slots are exchanged and which rows they carry. All ranks of a group use the same one."""

    def lay_out(self, pairs: SortedPairs) -> SlotOrder: ...


class SplitExchange:
    """One slot per row. The host reads the counts: one synchronisation per layer and forward pass."""

    def lay_out(self, pairs: SortedPairs) -> SlotOrder:
        sent, received = torch.stack([pairs.sent.sum(1), pairs.received.sum(1)]).tolist()
        ranks, local_experts = pairs.received.shape
        expert = torch.arange(local_experts, dtype=torch.int32, device=pairs.received.device).repeat(ranks)
        return SlotOrder(
            slot_pair=pairs.row_pair[: sum(sent)],
            pair_slot=pairs.pair_row,
            slot_expert=expert.repeat_interleave(pairs.received.flatten(), output_size=sum(received)),
            sent=sent,
            received=received,
        )


class PaddedExchange:
    """A block of fixed capacity for every rank, large enough for any routing: no row is ever dropped.

    The host reads nothing. The cost is P * max_tokens * min(K, E / P) slots instead of K per token, up to P times as
    many, so this is for small groups. ``max_tokens``: the largest number of tokens of any rank in a layer.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def lay_out(self, pairs: SortedPairs) -> SlotOrder:
        num_pairs = pairs.row_pair.numel()
        if num_pairs > self.max_tokens * pairs.top_k:
            raise KernelInputError(
                f"PaddedExchange: {num_pairs // pairs.top_k} tokens are more than max_tokens ({self.max_tokens}), "
                "for which all ranks set aside room; give it the largest number of tokens of any rank"
            )
        ranks, local_experts = pairs.sent.shape
        # A token chooses an expert at most once, so at most min(K, E / P) of its rows go to one rank.
        capacity = self.max_tokens * min(pairs.top_k, local_experts)
        place = torch.arange(capacity, dtype=torch.int32, device=pairs.sent.device)
        expert_ends = pairs.sent.flatten().cumsum(0, dtype=torch.int32).view(ranks, local_experts)
        ends = expert_ends[:, -1:]
        begins = ends - pairs.sent.sum(1, keepdim=True, dtype=torch.int32)  # [P, 1]: first sorted row for each rank

        rows = begins + place  # [P, capacity]
        # One extra pair at the end, so that an empty slot has an entry to read on a rank without tokens.
        row_pair = torch.cat([pairs.row_pair, pairs.row_pair.new_zeros(1)])
        slot_pair = row_pair[torch.where(rows < ends, rows, num_pairs)]

        # The rank of a sorted row: the number of ranks whose rows end at or before it.
        rank_ends = ends.flatten().contiguous()
        rank = torch.searchsorted(rank_ends, pairs.pair_row, right=True, out_int32=True).clamp(max=ranks - 1)
        pair_slot = rank * capacity + pairs.pair_row - begins.flatten()[rank]
        received_ends = pairs.received.cumsum(1, dtype=torch.int32)
        places = place.expand(ranks, capacity).contiguous()
        return SlotOrder(
            slot_pair=slot_pair.flatten(),
            pair_slot=torch.where(pairs.pair_row < 0, -1, pair_slot),
            slot_expert=torch.searchsorted(received_ends, places, right=True, out_int32=True).flatten(),
            sent=None,
            received=None,
        )


class _Flight:
    """An exchange of slots in flight between the ranks of a group: forward, or reversed for gradients."""

    def __init__(self, group: dist.ProcessGroup, sent: list[int] | None, received: list[int] | None) -> None:
        self.group, self.sent, self.received = group, sent, received
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def depart(self, slots: torch.Tensor, *, mirrored: bool = False) -> torch.Tensor:
        """Send slots [S, H] and return the buffer [Q, H] that is filled once :meth:`arrive` returns."""
        sent, received = (self.received, self.sent) if mirrored else (self.sent, self.received)
        arriving = slots.new_empty((slots.shape[0] if received is None else sum(received), *slots.shape[1:]))
        work = dist.all_to_all_single(arriving, slots.contiguous(), received, sent, group=self.group, async_op=True)
        assert work is not None, "this rank does not belong to the group"
        self._under_way = (work, arriving)
        return arriving

    def arrive(self) -> torch.Tensor:
        """Wait for the slots and return them. On CUDA the current stream waits, not the host."""
        assert self._under_way is not None
        (work, arrived), self._under_way = self._under_way, None
        work.wait()
        return arrived


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        return flight.depart(slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.flight.arrive(), None


class _Arrive(torch.autograd.Function):
    """Waits for what :class:`_Depart` sent. In the backward they swap roles, so both passes can overlap compute."""

    @staticmethod
    def forward(ctx, slots: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        flight.arrive()  # fills the slots themselves, which autograd requires to be returned as a view
        return slots.view_as(slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.flight.depart(grad, mirrored=True)
        return grad, None  # has the expected shape [Q, H]; _Depart takes the received [S, H] from the flight


class _FillSlots(torch.autograd.Function):
    """Tokens [T, H] -> slots [S, H]; the gradients of a token's slots are summed in the order of k, as results are."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, order: SlotOrder, top_k: int, backend: str) -> torch.Tensor:
        ctx.order, ctx.top_k, ctx.backend = order, top_k, backend
        return _take(x, order.slot_pair // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = _row_operators(ctx.backend).combine_rows(grad.contiguous(), ctx.order.pair_slot, ctx.top_k)
        return grad_x, None, None, None


class _Combine(torch.autograd.Function):
    """Slots [S, H] -> tokens [T, H]: the sum over k, in fp32 and in that order, weighted by topk_weights [T, K]."""

    @staticmethod
    def forward(ctx, slots: torch.Tensor, weights: torch.Tensor, order: SlotOrder, backend: str) -> torch.Tensor:
        weights = weights.contiguous()
        ctx.save_for_backward(slots, weights)
        ctx.order, ctx.backend = order, backend
        return _row_operators(backend).combine_rows(slots, order.pair_slot, weights.shape[1], weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slots, weights = ctx.saved_tensors
        if grad.shape[0] == 0:  # a rank without tokens still sends slots
            return torch.zeros_like(slots), torch.zeros_like(weights), None, None
        operators = _row_operators(ctx.backend)
        order = ctx.order
        grad_slots, values = operators.combine_rows_backward(grad.contiguous(), slots, order.slot_pair, weights)
        return grad_slots, operators.order_by_pair(values, order.pair_slot).view_as(weights), None, None


class _Reorder(torch.autograd.Function):
    """``rows[order]`` for a permutation; the gradient is gathered by the inverse instead of accumulated."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.index_select(0, ctx.inverse), None, None


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``rows[index]``; zeros if there are no rows, for the slots that a rank without tokens still sends."""
    if rows.shape[0] == 0:
        return rows.new_zeros((index.numel(), rows.shape[1]))
    return rows.index_select(0, index)


def _row_operators(backend: str) -> Any:
    """Return the module with the backend's operators on rows."""
    if backend == "triton":
        from moescale.kernels.experts import triton

        return triton
    from moescale.kernels.experts import reference

    return reference


class AllToAllDispatcher:
    """Dispatch by two all-to-alls in any process group: CPU ranks, GPUs on several hosts or without peer access.

    The number of tokens may differ between the ranks of ``group``; K and H must not. Gradients of the weights cover the
    tokens of the whole group.
    """

    is_recordable = False
    moves_rows_in_fp8 = False

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange) -> None:
        self.group = group
        self.exchange = exchange
        self.num_ranks = group.size()

    @torch.compiler.disable  # the exchange reads counts on the host, and its autograd functions hold a collective
    def __call__(
        self,
        experts: RoutedExperts,
        x: Activation,
        routing: Routing,
        overlapped: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        """As :class:`moescale.models.blocks.moe.Dispatcher`.

        ``overlapped`` is computed during dispatch, and its gradient during the backward of dispatch.
        """
        x = plain_of(x)
        backend = choose_backend(x.device, x.dtype, experts.backend)
        top_k, local_experts = routing.topk_ids.shape[1], experts.gate_up.shape[0]
        order = self.exchange.lay_out(self._sort(routing, local_experts, backend))

        there = _Flight(self.group, order.sent, order.received)
        slots = _Depart.apply(_FillSlots.apply(x, order, top_k, backend), there)
        row_slot, _, ends = sort_pairs(order.slot_expert.unsqueeze(1), local_experts, backend=backend)
        slot_row = torch.empty_like(row_slot)
        slot_row[row_slot] = torch.arange(row_slot.numel(), dtype=torch.int32, device=x.device)
        companion = None if overlapped is None else overlapped()
        rows = _Reorder.apply(_Arrive.apply(slots, there), row_slot, slot_row)

        gradients: dict[str, Any] = dict(gate_up_gradient=experts.gate_up_gradient, down_gradient=experts.down_gradient)
        compute: Callable[..., torch.Tensor]
        if experts.adapter is not None:
            compute = partial(
                adapted_expert_mlp, **experts.adapter.arguments(x), scales=experts.scales, backend=experts.backend
            )
        elif experts.gate_up_copies is not None and experts.down_copies is not None:
            copies: dict[str, Any] = dict(gate_up_copies=experts.gate_up_copies, down_copies=experts.down_copies)
            compute = partial(fp8_expert_mlp, **copies, **gradients)
        else:
            compute = partial(
                expert_mlp,
                **gradients,
                biases=experts.biases,
                bias_gradients=experts.bias_gradients,
                clamp=experts.clamp,
                scales=experts.scales,
                backend=experts.backend,
            )
        if experts.recompute_up and torch.is_grad_enabled():  # save only the received rows
            compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
        rows = compute(rows, experts.gate_up, experts.down, ends)

        back = _Flight(self.group, order.received, order.sent)
        slots = _Arrive.apply(_Depart.apply(_Reorder.apply(rows, slot_row, row_slot), back), back)
        out = _Combine.apply(slots, routing.topk_weights, order, backend)
        return out if companion is None else out + companion

    def _sort(self, routing: Routing, local_experts: int, backend: str) -> SortedPairs:
        ranks = self.num_ranks
        num_experts = local_experts * ranks
        if debug_checks_enabled():
            check_ids(routing.topk_ids, num_experts, routing.tokens_per_expert)
        row_pair, pair_row, ends = sort_pairs(routing.topk_ids, num_experts, backend=backend)
        sent = torch.diff(ends, prepend=ends.new_zeros(1))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return SortedPairs(
            row_pair=row_pair,
            pair_row=pair_row,
            sent=sent.view(ranks, -1),
            received=received.view(ranks, -1),
            top_k=routing.topk_ids.shape[1],
        )


def shard_experts(
    model: Transformer,
    plan: ParallelPlan,
    meshes: ExpertMeshes,
    *,
    dispatcher: Dispatcher,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Reduce every MoE layer to this rank's routed experts and set its ``dispatcher``, in place.

    The parameters keep their names; dimension 0 keeps the E / P experts of this rank. With ``plan.dense_sharding``
    fsdp, ranks with the same experts (edp, dp_replicate) shard them by FSDP2 in ``precision``, with gradients summed,
    not averaged. Otherwise they stay plain parameters, which must already have the compute dtype. Also runs on the meta
    device. ``plan.check_model`` has checked that ep divides the number of experts.
    """
    mesh = meshes.experts
    assert mesh["ep"].size() == plan.mesh.ep, (mesh, plan.mesh)
    for block, kind in zip(model.layers, family_of(model.config).layer_kinds(model.config), strict=True):
        if isinstance(block.feed_forward, MixtureOfExperts):
            experts = block.feed_forward.experts
            for module in experts.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, _local_experts(parameter, mesh["ep"]))
            experts.dispatcher = dispatcher
            if plan.dense_sharding == "fsdp":
                _share(experts, mesh, plan.layer(kind).reshard_after_forward, precision or MixedPrecisionPolicy())


class ExpertMeshes(Protocol):
    """The device mesh of the experts."""

    @property
    def experts(self) -> DeviceMesh:
        """Dimensions dp_replicate, edp and ep."""
        ...


def _local_experts(weight: nn.Parameter, ep: DeviceMesh) -> nn.Parameter:
    part = weight.detach().chunk(ep.size())[ep.get_local_rank()]
    return nn.Parameter(
        part.clone(), requires_grad=weight.requires_grad
    )  # a copy, so that the full tensor can be freed


def _share(experts: RoutedExperts, mesh: DeviceMesh, reshard: bool, precision: MixedPrecisionPolicy) -> None:
    replicas, shards = mesh["dp_replicate"].size(), mesh["edp"].size()
    if replicas * shards == 1:
        return
    fully_shard(
        experts,
        mesh=mesh["dp_replicate", "edp"] if replicas > 1 else mesh["edp"],
        reshard_after_forward=reshard,
        shard_placement_fn=lambda weight: Shard(expert_shard_dim(weight.shape, shards)),
        mp_policy=precision,
    )
    assert isinstance(experts, FSDPModule)
    # Every rank's loss is already its share of the mean over all tokens of the step.
    experts.set_gradient_divide_factor(1.0)
    experts.set_force_sum_reduction_for_comms(True)
