"""Hooks into the training loop on every rank: after an optimizer step and after a validation.

An observer (:mod:`moescale.report.observers`) only watches, on the first rank. A hook may change the weights, and may
call collectives, since all ranks call it at the same point of the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moescale.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Update:
    """An optimizer step that has just been made."""

    step: int
    """Steps done, this one included."""
    model: Transformer
    """The model with its new weights."""
    expert_rows: torch.Tensor
    """[MoE layers, E] int64 on the device: rows routed to each expert in this step, over all ranks. Cleared by the
    trainer when the next step starts."""


class TrainerHook:
    """Base class of hooks. Subclass it and override what you need; every method here does nothing."""

    def after_update(self, update: Update) -> Mapping[str, float] | None:
        """Called after the optimizer has updated the weights, so not for a step skipped as not finite.

        Returns:
            Further metrics of the step by name. Those of the first rank are recorded.
        """
        return None

    def after_validation(self, step: int, loss: float) -> None:
        """Called with the mean loss over the validation split after ``step``, in nats per target token."""
