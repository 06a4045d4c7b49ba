"""The linear layer of the model's products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moescale.kernels.linear import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose backward adds the weight's gradient to a buffer, where it has been given one."""

    weight_gradient: torch.Tensor | None = None

    def set_gradient_buffers(self, buffer: Callable[[str], torch.Tensor | None]) -> None:
        """Take the buffer to which the backward adds the weight's gradient: the weight's shape, its dtype or fp32."""
        self.weight_gradient = buffer("weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, weight_gradient=self.weight_gradient)
