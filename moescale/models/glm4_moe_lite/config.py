"""The configuration of GLM-4.7-Flash's architecture. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.models.latent.config import LatentAttentionConfig


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLiteConfig(LatentAttentionConfig):
    """The architecture that transformers calls glm4_moe_lite."""

    model_type: ClassVar[str] = "glm4_moe_lite"
    routing_methods: ClassVar[tuple[str, ...]] = ("noaux_tc",)
