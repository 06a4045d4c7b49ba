"""The OLMoE configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.errors import ConfigError
from moescale.models.grouped.config import GroupedQueryConfig


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(GroupedQueryConfig):
    """The OLMoE architecture (arXiv:2409.02060)."""

    model_type: ClassVar[str] = "olmoe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ConfigError(
                f"model.head_dim ({self.head_dim}) must be model.hidden_size ({self.hidden_size}) divided by "
                f"model.num_heads ({self.num_heads}): the norm of the queries has the width of the model"
            )
