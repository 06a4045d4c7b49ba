"""Measures during a run what quantisation to e4m3 is off by: one short forward and backward between two steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moescale.kernels.fp8.errors import Errors, collecting
from moescale.models.fp8_gemms import note_weights
from moescale.models.transformer import Transformer

PROBED_TOKENS = 256
"""Of a sequence, from its begin: few, so that they fit beside the activations that a recorded graph keeps."""


def fp8_errors(
    model: Transformer, tokens: torch.Tensor, targets: torch.Tensor, clear_gradients: Callable[[], None]
) -> dict[str, Errors]:
    """Return the errors by kind of tensor for the first tokens of ``tokens`` [B, S], its gradients those of the loss.

    ``clear_gradients`` is called after the backward, which adds to the model's gradients; there must be none before.
    """
    device = next(model.parameters()).device
    part = tokens[:1, :PROBED_TOKENS].to(device), targets[:1, :PROBED_TOKENS].to(device)
    with torch.compiler.set_stance("force_eager"), collecting() as collector:
        try:
            output = model(part[0], targets=part[1])
            (output.loss_sum / part[1].ge(0).sum().clamp(min=1)).backward()
        finally:
            clear_gradients()
        note_weights(model)
    return collector.errors()


def as_metrics(errors: dict[str, Errors]) -> dict[str, float]:
    """The same as numbers by name, for a run's metrics."""
    return {
        f"fp8_{field}/{name.replace(',', '').replace(' ', '_')}": value
        for name, found in errors.items()
        for field, value in found._asdict().items()
    }
