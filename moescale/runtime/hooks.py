"""Where other code takes part in the training loop, on every rank: after an optimizer step and after a validation.

An observer (:mod:`moescale.report.observers`) only looks on, on the first rank. A hook may change the weights, and may
call collectives, since all ranks call it at the same point of the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moescale.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is known after an optimizer step."""

    step: int
    """Steps done, this one included."""
    model: Transformer
    """With the new weights."""
    expert_rows: torch.Tensor
    """[MoE layers, E] int64 on the device: rows routed to each expert in this step, over all ranks. The trainer clears
    it when the next step starts."""


class TrainerHook:
    """Takes part in the training. Subclass it and override what you need; every method does nothing here."""

    def after_update(self, update: Update) -> Mapping[str, float] | None:
        """The optimizer has updated the weights. Not called for a step that was skipped as not finite.

        Returns:
            Metrics of the step by name, for its record. The first rank's count.
        """
        return None

    def after_validation(self, step: int, loss: float) -> None:
        """The mean loss over the validation split after ``step``, in nats per target token."""
