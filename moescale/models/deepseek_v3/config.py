"""The DeepSeek-V3 configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.models.latent.config import LatentAttentionConfig


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3Config(LatentAttentionConfig):
    """The DeepSeek-V3 architecture (arXiv:2412.19437)."""

    model_type: ClassVar[str] = "deepseek_v3"
    routing_methods: ClassVar[tuple[str, ...]] = ("noaux_tc",)
