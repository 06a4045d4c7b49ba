"""Metrics of a training run: a record per step, a summary per run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def to_json(document: Any, **options: Any) -> str:
    """Return ``document`` as JSON, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(document), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    """Nats per target token, without the auxiliary loss."""
    aux_loss: float
    """Load-balancing loss, averaged over MoE layers and micro-batches, without the factor alpha."""
    learning_rate: float
    gradient_norm: float
    """L2 norm of all gradients before clipping."""
    tokens: int
    step_seconds: float
    peak_bytes: int
    """Largest device memory allocated so far; 0 on the CPU."""
    expert_load: list[list[float]]
    """Per MoE layer, each expert's fraction of the routed rows times the number of experts: 1 is balanced."""
    allocator_retries: int = 0
    """Number of times in this step that torch's allocator ran out of memory, freed its cache and retried."""
    data_seconds: float = 0.0
    """Time waiting for the step's batches, not included in ``step_seconds``."""
    skipped: bool = False
    """True if loss or gradient norm was not finite, so that the weights were not updated."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further metrics by name, returned by the run's hooks."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt of the validation split and the model's continuation, as text, or as token ids without a tokenizer."""

    sequence: int
    """Index of the prompt's sequence in the validation split."""
    prompt: str
    answer: str
    """The model's continuation."""
    wanted: str
    """The corpus's continuation, cut to the maximum length of an answer."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """Summary of a finished run."""

    steps: int
    tokens: int
    """Tokens of the steps done by this process, so not those before a resume."""
    seconds: float
    """Wall time of this process's training loop."""
    final_loss: float | None
    validation_loss: float | None
    skipped_steps: int
    resumed_from_step: int | None
    checkpoint: str | None
