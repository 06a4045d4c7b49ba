"""Adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) for a model whose own weights are frozen.

Whatever a family registers in its layers as :class:`~moescale.models.blocks.linear.Linear` or
:class:`~moescale.models.blocks.moe.RoutedExperts` can have one: routed experts one each, stacked. Layers that are
stacked in one weight, gate and up of an MLP, have one each too, as PEFT gives them; of routed experts, gate and up
share A, as PEFT's ``target_parameters`` do on the experts of transformers.

Adapters are parameters named ``MODULE.adapter.*``, in fp32 whatever the dtype of the model, and the only ones that are
trained. Names and order of the frozen weights stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moescale.errors import ConfigError
from moescale.kernels.adapted_linear import adapted_linear
from moescale.kernels.experts.adapted import ExpertAdapters
from moescale.lora import LoraSettings
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.moe import RoutedExperts
from moescale.models.frozen_fp8 import keep_in_fp8
from moescale.models.transformer import ADAPTER, Transformer


class LinearAdapter(nn.Module):
    """What is added to a linear layer [N, K] of P parts: ``a`` [P * r, K] and ``b`` [N, r]."""

    def __init__(self, linear: Linear, lora: LoraSettings) -> None:
        super().__init__()
        self.lora = lora
        self.num_parts = linear.num_parts
        new = partial(torch.empty, dtype=torch.float32, device=linear.weight.device)
        self.a = nn.Parameter(new(self.num_parts * lora.rank, linear.in_features))
        self.b = nn.Parameter(new(linear.out_features, lora.rank))
        self.gradients: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def set_gradient_buffers(self, buffer: Callable[[str], torch.Tensor | None]) -> None:
        """Take the buffers to which the backward adds the gradients."""
        self.gradients = (buffer("a"), buffer("b"))

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dropped = F.dropout(x, self.lora.dropout) if self.training and self.lora.dropout else None
        return adapted_linear(
            x,
            weight,
            bias,
            self.a,
            self.b,
            scale=self.lora.scale,
            num_parts=self.num_parts,
            dropped=dropped,
            weight_scale=weight_scale,
            gradients=self.gradients,
        )


class ExpertsAdapter(nn.Module):
    """What is added to a layer's routed experts; shapes as in :class:`~moescale.kernels.experts.adapted`."""

    def __init__(self, experts: RoutedExperts, lora: LoraSettings) -> None:
        super().__init__()
        self.lora = lora
        num_experts, hidden, ffn = experts.down.shape
        new = partial(torch.empty, dtype=torch.float32, device=experts.down.device)
        self.gate_up_a = nn.Parameter(new(num_experts, lora.rank, hidden))
        self.gate_up_b = nn.Parameter(new(num_experts, 2 * ffn, lora.rank))
        self.down_a = nn.Parameter(new(num_experts, lora.rank, ffn))
        self.down_b = nn.Parameter(new(num_experts, hidden, lora.rank))
        self.gradients: ExpertAdapters | None = None

    def set_gradient_buffers(self, buffer: Callable[[str], torch.Tensor | None]) -> None:
        """Take the buffers to which the backward adds the gradients: all of them, or none."""
        buffers = [found for name in ExpertAdapters._fields if (found := buffer(name)) is not None]
        self.gradients = ExpertAdapters(*buffers) if buffers else None

    def factors(self) -> ExpertAdapters:
        """The parameters."""
        return ExpertAdapters(*(getattr(self, name) for name in ExpertAdapters._fields))

    def arguments(self, x: torch.Tensor) -> dict[str, Any]:
        """As :class:`moescale.models.blocks.moe.Adapter`.

        Without buffers where ``x`` needs no gradient: a compiled backward would leave out an operator that returns
        nothing which is needed.
        """
        return {
            "adapters": self.factors(),
            "scale": self.lora.scale,
            "gradients": self.gradients if x.requires_grad else None,
        }


def add_adapters(model: Transformer, lora: LoraSettings) -> None:
    """Freeze all weights of ``model`` and add adapters to its targets, in place, on the model's device, not yet filled.

    Frozen weights are kept as ``lora.base`` says.

    Comes before the model is divided over ranks. Raises ConfigError for a target that the model does not have.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = [item for block in model.layers for item in _adaptable(block)]
    config = model.config
    is_plain = not config.has_expert_biases and config.swiglu_clamp is None
    lora.check_targets((path for path, _ in modules), has_plain_experts=is_plain)
    if lora.base == "fp8":
        keep_in_fp8(module for _, module in modules)
    for path, module in modules:
        if lora.has_target(path):
            if isinstance(module, RoutedExperts) and (module.biases is not None or module.clamp is not None):
                raise ConfigError(
                    f"lora.targets: '{path}' has biases or a clamped activation, for which there are no adapters; name "
                    "the targets without it, such as those of attention"
                )
            module.adapter = (
                ExpertsAdapter(module, lora) if isinstance(module, RoutedExperts) else LinearAdapter(module, lora)
            )
    model.is_frozen = True
    model.has_dropout = lora.dropout > 0


def _adaptable(block: nn.Module) -> Iterable[tuple[str, Linear | RoutedExperts]]:
    for path, module in block.named_modules():
        if isinstance(module, Linear | RoutedExperts):
            yield path, module


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name belongs to an adapter."""
    return ADAPTER in name


def adapters_of(model: nn.Module) -> dict[str, LinearAdapter | ExpertsAdapter]:
    """The adapters of a model by the name of the module that each is added to."""
    return {
        name.removesuffix(".adapter"): module
        for name, module in model.named_modules()
        if isinstance(module, LinearAdapter | ExpertsAdapter)
    }
