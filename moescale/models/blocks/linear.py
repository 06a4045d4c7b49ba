"""The linear layer of the model's products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moescale.kernels.fp8 import Copies
from moescale.kernels.fp8.linear import fp8_linear
from moescale.kernels.linear import frozen_linear, linear
from moescale.models.blocks.norm import Activation, plain_of, rows_of


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose backward adds the weight's gradient to a buffer, where it has been given one.

    With ``num_parts`` the weight stacks as many layers of equal size, which adapters treat each by itself.
    """

    weight_gradient: torch.Tensor | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, num_parts: int = 1) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.num_parts = num_parts
        self.adapter: Callable[..., torch.Tensor] | None = None
        """(x, weight, bias, weight_scale) -> the result, where the weight is frozen and adapted
        (:mod:`moescale.models.lora`)."""
        self.weight_scale: nn.Parameter | None
        """Where the weight is frozen and in fp8, its scales (:mod:`moescale.models.frozen_fp8`)."""
        self.register_parameter("weight_scale", None)
        self.copies: Copies | None = None
        """Where products are in fp8, what they read of the weight (:mod:`moescale.models.fp8_gemms`)."""

    def set_gradient_buffers(self, buffer: Callable[[str], torch.Tensor | None]) -> None:
        """Take the buffer to which the backward adds the weight's gradient: the weight's shape, its dtype or fp32."""
        self.weight_gradient = buffer("weight")

    def forward(self, x: Activation) -> torch.Tensor:
        plain = plain_of(x)
        if self.adapter is not None:
            return self.adapter(plain, self.weight, self.bias, self.weight_scale)
        if self.weight_scale is not None:
            return frozen_linear(plain, self.weight, self.weight_scale, self.bias)
        if self.copies is not None:
            return fp8_linear(
                plain,
                self.weight,
                self.copies,
                self.bias,
                quantized=rows_of(x),
                weight_gradient=self.weight_gradient,
            )
        return linear(plain, self.weight, self.bias, weight_gradient=self.weight_gradient)
