"""The configuration of a decoder with grouped-query attention. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.config import ModelConfig, YarnConfig
from moescale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(ModelConfig):
    """A decoder whose attention is that of Ainslie et al. 2023 (arXiv:2305.13245)."""

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
