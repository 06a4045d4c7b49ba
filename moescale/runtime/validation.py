"""Computes the mean loss over the validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from moescale.coordinates import Coordinates
from moescale.kernels.attention import Documents
from moescale.models.transformer import Transformer
from moescale.runtime.ranks import Ranks
from moescale.runtime.step_source import Batch


@torch.no_grad()
def validation_loss(
    model: Transformer,
    batches: Iterable[Batch],
    ranks: Ranks,
    coordinates: Coordinates,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> float | None:
    """Return the mean loss in nats per target token over all ranks, or None without any target. A collective.

    Args:
        batches: this rank's batches, equally many on every rank.
        on_batch: called before each batch.
    """
    device = next(model.parameters()).device
    model.eval()
    loss_sum, num_targets = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        on_batch()
        starts = batch.document_starts
        output = model(
            batch.tokens.to(device),
            targets=batch.targets.to(device),
            documents=None if starts is None else Documents.from_starts(starts, device),
        )
        loss_sum += output.loss_sum
        num_targets += int((batch.targets >= 0).sum())
    model.train()
    if not coordinates.counts_tokens:
        loss_sum.zero_()
    ranks.sum(loss_sum)
    (num_targets,) = ranks.sum_on_host([num_targets * coordinates.counts_batches])
    return loss_sum.item() / num_targets if num_targets else None
