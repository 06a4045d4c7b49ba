"""The Qwen3-MoE configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.config import ModelConfig, YarnConfig
from moescale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(ModelConfig):
    """What families with grouped-query attention share."""

    num_key_value_heads: int
    """Each serves ``num_heads / num_key_value_heads`` query heads."""
    head_dim: int
    yarn: YarnConfig | None = None
    """None: plain RoPE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("num_key_value_heads", "head_dim")
        if self.num_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_heads ({self.num_heads}) must be divisible by model.num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim ({self.head_dim}) must be even: RoPE rotates pairs")

    @property
    def key_value_width(self) -> int:
        return 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(GroupedQueryConfig):
    """The Qwen3-MoE architecture (arXiv:2505.09388)."""

    model_type: ClassVar[str] = "qwen3_moe"
