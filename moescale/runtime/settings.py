"""Settings of a training run. What decides speed and memory is in the plan; what decides the result is here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from moescale.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Optimization, validation and checkpoint settings of ``moescale run``."""

    steps: int | None = None
    """Optimizer steps in all, counted from the start of training; default: as many as end with the first epoch."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step as a fraction of the peak (linear and cosine schedules, where the warm-up ends
    before it)."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: float = 0.1
    """AdamW: decoupled weight decay on matrices; norms and biases are not decayed."""
    router_bias_update_rate: float = 1e-3
    """DeepSeek-V3's balancing: how far a step moves each expert's bias in the choice, up where it got fewer tokens than
    the mean and down where more; 0 leaves biases as they are. Families without such a bias have no use for it."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    seed: int = 0
    """Seed of initial weights and data order."""
    validation_every: int = 0
    """Steps between validations; 0: only at the end."""
    validation_sequences: int = 256
    """Validation sequences per validation, at most."""
    sample_every: int = 0
    """Steps between samples, in which the model continues prompts of the validation split; 0: never."""
    samples: int = 3
    """Prompts that are continued each time."""
    sample_tokens: int = 64
    """Tokens of a sample, at most."""
    fp8_errors_every: int = 100
    """Where one GPU multiplies in fp8: steps between measurements of what rounding to it is off by, from the first step
    on; 0: never."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end and when stopped."""
    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints, besides checkpoint_every; 0: off."""
    final_checkpoint: bool = True
    """Write a checkpoint after the last step; without it and any other, a run leaves no weights (to measure with)."""
    keep_checkpoints: int = 2
    """Checkpoints kept, newest first."""
    background_checkpoints: bool = True
    """Write checkpoints beside the training, from a copy in host memory; where that does not fit, training waits."""
    cuda_graphs: bool = True
    """On a GPU, record a micro-batch once and replay it, so that the host's work does not hold it up."""
    skip_nonfinite: bool = False
    """Skip a step whose loss or gradient norm is not finite, and count it, instead of stopping."""
    max_skipped_steps: int = 10
    """With skip_nonfinite: so many skipped in a row stop the run all the same."""

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("steps", self.steps is None or self.steps > 0, "must be positive; leave it out for one epoch"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "must be positive and finite"),
            ("schedule", self.schedule in get_args(Schedule), f"must be one of {', '.join(get_args(Schedule))}"),
            ("warmup_steps", self.warmup_steps >= 0, "must not be negative; 0 begins at the peak learning rate"),
            ("final_learning_rate_ratio", 0 <= self.final_learning_rate_ratio <= 1, "must be between 0 and 1"),
            ("beta1", 0 <= self.beta1 < 1, "must be at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "must be at least 0 and below 1"),
            ("eps", 0 < self.eps < math.inf, "must be positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "must be finite and not negative; 0 turns it off"),
            (
                "router_bias_update_rate",
                0 <= self.router_bias_update_rate < math.inf,
                "must be finite and not negative; 0 leaves the biases as they are",
            ),
            ("gradient_clip", 0 <= self.gradient_clip < math.inf, "must be finite; 0 turns clipping off"),
            ("seed", -(2**63) <= self.seed < 2**63, "must have 64 bits: from -2^63 to 2^63 - 1"),
            ("validation_every", self.validation_every >= 0, "must not be negative; 0 means at the end only"),
            (
                "validation_sequences",
                self.validation_sequences > 0,
                "must be positive; a corpus without a validation split is not validated",
            ),
            ("sample_every", self.sample_every >= 0, "must not be negative; 0 means never"),
            ("samples", self.samples > 0, "must be positive; run.sample_every 0 turns samples off"),
            ("sample_tokens", self.sample_tokens > 0, "must be positive; run.sample_every 0 turns samples off"),
            ("fp8_errors_every", self.fp8_errors_every >= 0, "must not be negative; 0 means never"),
            ("checkpoint_every", self.checkpoint_every >= 0, "must not be negative; 0 means at the end only"),
            ("checkpoint_minutes", 0 <= self.checkpoint_minutes < math.inf, "must be finite; 0 turns it off"),
            (
                "keep_checkpoints",
                self.keep_checkpoints >= 1,
                "must be at least 1; run.final_checkpoint false and no checkpoint_every write none",
            ),
            (
                "max_skipped_steps",
                self.max_skipped_steps >= 1,
                "must be at least 1; without run.skip_nonfinite none is skipped",
            ),
        ]
        defaults = {item.name: item.default for item in fields(self)}
        for name, holds, rule in rules:
            if not holds:
                remedy = "" if ";" in rule else f"; leave it out for {defaults[name]}"
                raise ConfigError(f"run.{name} ({getattr(self, name)}) {rule}{remedy}")

    @property
    def writes_checkpoints(self) -> bool:
        """True if a run writes checkpoints without being asked to stop."""
        return self.final_checkpoint or self.checkpoint_every > 0 or self.checkpoint_minutes > 0


DECIDE_RESULT = (
    *("learning_rate", "schedule", "warmup_steps", "final_learning_rate_ratio", "beta1", "beta2", "eps"),
    *("weight_decay", "router_bias_update_rate", "gradient_clip", "skip_nonfinite"),
)
"""Settings that change what a run computes, and may differ when it resumes; the seed may not."""


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return ``name old -> new`` for each of ``names`` that both have and in which they differ."""
    known = [name for name in names if name in before and name in now]
    return [f"{name} {before[name]} -> {now[name]}" for name in known if before[name] != now[name]]


def warmup_problem(settings: TrainSettings, total_steps: int) -> str | None:
    """Return what is lost where the warm-up takes all of a run's steps, else None."""
    if settings.warmup_steps >= total_steps:
        return (
            f"run.warmup_steps ({settings.warmup_steps}) reaches past the last step ({total_steps}): the peak learning "
            "rate is never reached"
        )
    if settings.warmup_steps > 0 and settings.warmup_steps == total_steps - 1 and settings.schedule != "constant":
        return (
            f"run.warmup_steps ({settings.warmup_steps}) ends at the last step ({total_steps}): the learning rate "
            f"never falls as run.schedule ({settings.schedule}) says"
        )
    return None


def learning_rate_at(settings: TrainSettings, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 0) in a run of ``total_steps``.

    Warm-up rises linearly and reaches the peak at step ``warmup_steps``; linear and cosine schedules reach
    ``final_learning_rate_ratio`` of the peak at the last step, if that comes after the warm-up and is not the only one.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, total_steps - 1 - settings.warmup_steps)
    progress = min(1.0, progress)
    remaining = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    floor = settings.final_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * remaining)
