"""Measures during a run what quantisation to e4m3 is off by: one short forward and backward between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moescale.kernels.attention import Documents
from moescale.kernels.fp8.errors import Errors, collecting
from moescale.models.fp8_gemms import note_weights
from moescale.models.transformer import Transformer
from moescale.runtime.step_source import Batch

PROBED_TOKENS = 256
"""Of a sequence: few, so that they fit next to the activations that a recorded graph keeps."""


def fp8_errors(model: Transformer, batches: Sequence[Batch], clear_gradients: Callable[[], None]) -> dict[str, Errors]:
    """Return the errors by kind of tensor for a few tokens of ``batches``, its gradients those of the loss.

    The tokens begin at the first one with a target: before it, as in a long prompt, all gradients are zero. Batches
    without targets have no errors. ``clear_gradients`` is called after the backward, which adds to the model's
    gradients; there must be none before.
    """
    batch = next((batch for batch in batches if batch.targets.ge(0).any()), None)
    if batch is None:
        return {}
    length = batch.targets.shape[1]
    row, first = divmod(int(batch.targets.ge(0).flatten().int().argmax()), length)
    first = max(0, min(first, length - PROBED_TOKENS))
    part = slice(row, row + 1), slice(first, first + PROBED_TOKENS)
    device = next(model.parameters()).device
    tokens, targets = batch.tokens[part].to(device), batch.targets[part].to(device)
    starts = batch.document_starts
    documents = None if starts is None else Documents.from_starts(starts[part], device)
    with torch.compiler.set_stance("force_eager"), collecting() as collector:
        try:
            output = model(tokens, targets=targets, documents=documents)
            (output.loss_sum / targets.ge(0).sum()).backward()
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
