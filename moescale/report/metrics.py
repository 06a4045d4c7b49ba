"""What a training run tells of itself: one record per step, one per run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def to_json(document: Any, **options: Any) -> str:
    """``document`` as JSON, which knows no NaN and no infinity: null stands for them."""
    return json.dumps(_finite(document), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What is known after one step."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    """Nats per target token, without the auxiliary loss."""
    aux_loss: float
    """Load-balancing loss by its definition, mean over MoE layers and micro-batches, not times alpha."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    step_seconds: float
    peak_bytes: int
    """Largest device memory allocated so far; 0 on the CPU."""
    expert_load: list[list[float]]
    """Per MoE layer, each expert's share of the routed rows times the number of experts: 1 is balanced."""
    allocator_retries: int = 0
    """Times that torch's allocator found no memory in this step, gave back what it kept and asked again."""
    data_seconds: float = 0.0
    """Waiting for the step's batches, in addition to ``step_seconds``."""
    skipped: bool = False
    """The step's loss or gradient norm was not finite, and weights were left alone."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further metrics by name, from the hooks of the run."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt of the validation split, and how the model continues it; texts, or ids where there is no tokenizer."""

    sequence: int
    """The sequence of the validation split that the prompt is from."""
    prompt: str
    answer: str
    """The model's."""
    wanted: str
    """The corpus's, cut to the tokens that the model was given for its own."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a run ended."""

    steps: int
    tokens: int
    """Tokens of the steps done by this process."""
    seconds: float
    """Wall time of this process's training loop."""
    final_loss: float | None
    validation_loss: float | None
    skipped_steps: int
    resumed_from_step: int | None
    checkpoint: str | None
