"""The gpt-oss configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.errors import ConfigError
from moescale.models.grouped.config import GroupedQueryConfig


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(GroupedQueryConfig):
    """The gpt-oss architecture (model card, arXiv:2508.10925, section 2)."""

    model_type: ClassVar[str] = "gpt_oss"

    attention_bias: bool
    """Biases of the query, key, value and output projections."""
    window: int
    """Keys that a token sees in layers with a window, itself included."""
    windowed_layers: tuple[int, ...]
    """The layers with a window, in ascending order; in the others a token sees all that precede it."""
    swiglu_alpha: float
    swiglu_limit: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("window", "swiglu_alpha", "swiglu_limit")
        if self.top_k < 2:
            raise ConfigError(
                f"model.top_k ({self.top_k}) must be at least 2: the softmax over one chosen expert trains no router"
            )
        if list(self.windowed_layers) != sorted(set(self.windowed_layers) & set(range(self.num_layers))):
            raise ConfigError(
                f"model.windowed_layers ({self.windowed_layers}) must be layers below model.num_layers "
                f"({self.num_layers}), in ascending order"
            )

    @property
    def has_router_bias(self) -> bool:
        return True

    @property
    def has_expert_biases(self) -> bool:
        return True

    @property
    def swiglu_clamp(self) -> tuple[float, float]:
        return self.swiglu_alpha, self.swiglu_limit
