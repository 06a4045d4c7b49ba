"""Feed-forward layers: a gated MLP, and the mixture of experts (DeepSeek-V2, arXiv:2405.04434, section 2.2).

Every token goes to ``top_k`` of E routed experts and to all shared experts. Routed experts are stacked in memory, so
one grouped GEMM serves them all; the shared experts act as a single MLP of their summed width. :class:`RoutedExperts`
holds the weights of this rank's experts, its :class:`Dispatcher` brings them the rows: expert parallelism swaps that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from moescale.config import ModelConfig
from moescale.kernels.experts import ExpertBiases, ExpertScales, SwigluClamp
from moescale.kernels.experts import experts as run_experts
from moescale.kernels.experts.adapted import adapted_experts
from moescale.kernels.fp8 import Copies
from moescale.kernels.fp8.mlp import fp8_mlp
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.router import Routing, route, router_logits
from moescale.kernels.swiglu import swiglu
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.norm import Activation, Normed, plain_of, rows_of


class FeedForwardOutput(NamedTuple):
    """A feed-forward's result and, from a MoE layer, what its router did."""

    hidden: torch.Tensor
    """[B, S, H]"""
    aux_loss: torch.Tensor | None
    """Scalar fp32: the load-balancing loss by its published definition, not yet times ``aux_loss_alpha``."""
    tokens_per_expert: torch.Tensor | None
    """[E] int32: routed rows each expert received; where the caller said which tokens count, or are padding, of those
    that count and are none."""


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one product, gate rows first."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=False, num_parts=2)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def norm_readers(self) -> Iterator[tuple[None, Linear]]:
        """The layer that reads what the MLP is given."""
        yield None, self.gate_up

    def forward(self, x: Activation) -> torch.Tensor:
        gate_up, down = self.gate_up, self.down
        if gate_up.copies is None or down.copies is None:
            return down(swiglu(gate_up(x)))
        return fp8_mlp(
            plain_of(x),
            gate_up.weight,
            down.weight,
            gate_up.copies,
            down.copies,
            quantized=rows_of(x),
            gate_up_gradient=gate_up.weight_gradient,
            down_gradient=down.weight_gradient,
        )


class DenseFeedForward(GatedMLP):
    """The feed-forward of a layer without experts, with the interface of :class:`MixtureOfExperts`."""

    def forward(  # type: ignore[override]
        self, x: Activation, counted: torch.Tensor | None = None, padding: torch.Tensor | None = None
    ) -> FeedForwardOutput:
        return FeedForwardOutput(super().forward(x), None, None)


class Router(nn.Module):
    """Chooses ``top_k`` experts per token; logits and probabilities are fp32 whatever the compute dtype.

    ``choice_bias`` [E], where the routing method has one, is a buffer: saved with the weights, without a gradient, and
    fp32 whatever dtype the model is converted to, because its steps are too small for others.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.has_router_bias else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.has_choice_bias else None
        self.choice_bias: torch.Tensor | None
        self.register_buffer("choice_bias", bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        before = self.choice_bias
        super()._apply(fn, recurse)
        if before is not None and self.choice_bias is not None and self.choice_bias.dtype != before.dtype:
            self.choice_bias = before.to(self.choice_bias.device)
        return self

    def forward(
        self,
        x: torch.Tensor,
        num_sequences: int,
        counted: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> Routing:
        """Route x [T, H] of ``num_sequences`` equal sequences.

        ``counted`` [T] bool: the tokens that ``load`` is of; ``padding`` [T] bool: those that no statistic is of.
        """
        config = self.config
        logits = router_logits(x, self.weight)
        return route(
            logits if self.bias is None else logits + self.bias.float(),
            bias=self.choice_bias,
            counted=counted,
            padding=padding,
            top_k=config.top_k,
            group_limited=config.limits_groups,
            num_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            normalize_topk=config.normalize_topk,
            routed_scaling_factor=config.routed_scaling_factor,
            num_sequences=num_sequences if config.aux_loss_per_sequence else None,
        )


class Dispatcher(Protocol):
    """Brings tokens to the experts that they chose and their results back."""

    num_ranks: int
    """Ranks that share the experts of a layer among them."""
    is_recordable: bool
    """Whether a CUDA graph can hold its work: no size that the host must know, no call of the host's."""
    moves_rows_in_fp8: bool
    """Whether experts in fp8 get tokens as they were quantised before; else in the compute dtype."""

    def __call__(
        self,
        experts: RoutedExperts,
        x: Activation,
        routing: Routing,
        overlapped: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return what the experts of all ranks make of x [T, H], plus the result of ``overlapped``.

        A dispatcher that waits for other ranks runs ``overlapped`` meanwhile.
        """
        ...


class Adapter(Protocol):
    """What is added to frozen routed experts (:mod:`moescale.models.lora`)."""

    def arguments(self, x: torch.Tensor) -> dict[str, Any]:
        """The arguments by which operators of :mod:`moescale.kernels.experts.adapted` know it, for the input ``x``."""
        ...


class LocalDispatcher:
    """For a rank that holds all experts: rows are gathered and combined in its own memory."""

    num_ranks = 1
    is_recordable = True
    moves_rows_in_fp8 = True

    def __call__(
        self,
        experts: RoutedExperts,
        x: Activation,
        routing: Routing,
        overlapped: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        plain = plain_of(x)
        gradients: dict[str, Any] = dict(gate_up_gradient=experts.gate_up_gradient, down_gradient=experts.down_gradient)
        how: dict[str, Any] = dict(scales=experts.scales, backend=experts.backend)
        run: Callable[..., torch.Tensor]
        if experts.adapter is not None:
            run = partial(adapted_experts, **experts.adapter.arguments(plain), **how)
        elif experts.gate_up_copies is not None and experts.down_copies is not None:
            run = partial(
                fp8_experts,
                gate_up_copies=experts.gate_up_copies,
                down_copies=experts.down_copies,
                quantized=rows_of(x),
                tokens_per_expert=routing.tokens_per_expert,
                **gradients,
            )
        else:
            run = partial(
                run_experts,
                tokens_per_expert=routing.tokens_per_expert,
                biases=experts.biases,
                bias_gradients=experts.bias_gradients,
                clamp=experts.clamp,
                **gradients,
                **how,
            )
        out = run(
            plain,
            routing.topk_ids,
            routing.topk_weights,
            experts.gate_up,
            experts.down,
            recompute_up=experts.recompute_up,
        )
        return out if overlapped is None else out + overlapped()


class RoutedExperts(nn.Module):
    """This rank's routed experts of a layer, stacked: ``gate_up`` [E, 2F, H] (gate rows first), ``down`` [E, H, F].

    Where the family has them also their biases, ``gate_up_bias`` [E, 2F] and ``down_bias`` [E, H]. Weights in fp8
    (:mod:`moescale.models.frozen_fp8`) come with their scales, ``gate_up_scale`` and ``down_scale``.
    All experts of the layer until a plan leaves it with E / P of them and sets the ``dispatcher`` for P ranks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        width = config.expert_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.gate_up_bias = self.down_bias = None
        if config.has_expert_biases:
            self.gate_up_bias = nn.Parameter(torch.empty(config.num_experts, 2 * width))
            self.down_bias = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.gate_up_scale: nn.Parameter | None
        self.down_scale: nn.Parameter | None
        self.register_parameter("gate_up_scale", None)
        self.register_parameter("down_scale", None)
        self.clamp = None if config.swiglu_clamp is None else SwigluClamp(*config.swiglu_clamp)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.adapter: Adapter | None = None
        self.backend = "auto"
        self.recompute_up = False  # save no pre-activation, compute it again in the backward
        self.gate_up_gradient: torch.Tensor | None = None
        self.down_gradient: torch.Tensor | None = None
        self.bias_gradients: ExpertBiases | None = None
        self.gate_up_copies: Copies | None = None
        """Where products are in fp8, what they read of the weight (:mod:`moescale.models.fp8_gemms`)."""
        self.down_copies: Copies | None = None

    @property
    def biases(self) -> ExpertBiases | None:
        """Those of the experts, if they have any."""
        if self.gate_up_bias is None or self.down_bias is None:
            return None
        return ExpertBiases(self.gate_up_bias, self.down_bias)

    @property
    def scales(self) -> ExpertScales | None:
        """Those of weights in fp8."""
        if self.gate_up_scale is None or self.down_scale is None:
            return None
        return ExpertScales(self.gate_up_scale, self.down_scale)

    def forward(
        self, x: Activation, routing: Routing, overlapped: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[T, H] -> [T, H]: the sum over the chosen experts, weighted by the router, plus what ``overlapped`` returns.

        The ids of one token must differ.
        """
        return self.dispatcher(self, x, routing, overlapped)

    def set_gradient_buffers(self, buffer: Callable[[str], torch.Tensor | None]) -> None:
        """Take the buffers, found by parameter name, to which the backward adds the weights' gradients."""
        self.gate_up_gradient = buffer("gate_up")
        self.down_gradient = buffer("down")
        if self.biases is not None:
            of_gate_up, of_down = buffer("gate_up_bias"), buffer("down_bias")
            self.bias_gradients = None
            if of_gate_up is not None and of_down is not None:
                self.bias_gradients = ExpertBiases(of_gate_up, of_down)

    def extra_repr(self) -> str:
        return f"local_experts={self.gate_up.shape[0]}, ranks={self.dispatcher.num_ranks}"


def _flattened(marks: torch.Tensor | None) -> torch.Tensor | None:
    return None if marks is None else marks.flatten()


class MixtureOfExperts(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.expert_intermediate_size
            self.shared_experts = GatedMLP(config.hidden_size, width)

    def norm_readers(self) -> Iterator[tuple[None, Linear | RoutedExperts]]:
        """The layers that read what this one is given, the router left out."""
        yield None, self.experts
        if self.shared_experts is not None:
            yield from self.shared_experts.norm_readers()

    def forward(
        self, x: Activation, counted: torch.Tensor | None = None, padding: torch.Tensor | None = None
    ) -> FeedForwardOutput:
        """[B, S, H] -> [B, S, H].

        ``counted`` [B, S] bool: the tokens that ``tokens_per_expert`` counts, or all; ``padding`` [B, S] bool: those
        that neither it nor the auxiliary loss counts.
        """
        plain, rows = plain_of(x), rows_of(x)
        flat = plain.flatten(0, 1)  # [T, H]
        routing = self.router(flat, plain.shape[0], _flattened(counted), _flattened(padding))
        given = flat if rows is None else Normed(flat, rows)
        # A dispatcher between ranks computes the shared experts while it waits for the others.
        overlapped = None if self.shared_experts is None else partial(self.shared_experts, given)
        hidden = self.experts(given, routing, overlapped).view_as(plain)
        return FeedForwardOutput(hidden, routing.aux_loss, routing.load)
