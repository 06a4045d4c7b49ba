"""The Qwen3-MoE configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.models.grouped.config import GroupedQueryConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(GroupedQueryConfig):
    """The Qwen3-MoE architecture (arXiv:2505.09388)."""

    model_type: ClassVar[str] = "qwen3_moe"
