"""The linear layer of the model's products."""

from __future__ import annotations

import torch
from torch import nn

from moescale.kernels.linear import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose backward adds the weight's gradient to a buffer, where it has been given one."""

    # Set by an optimizer that keeps such buffers; the weight's shape, its dtype or fp32.
    weight_gradient: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, weight_gradient=self.weight_gradient)
