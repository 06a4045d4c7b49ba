"""The DeepSeek-V2 configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moescale.models.latent.config import LatentAttentionConfig


@dataclass(frozen=True, kw_only=True)
class DeepSeekV2Config(LatentAttentionConfig):
    """The DeepSeek-V2 architecture (arXiv:2405.04434)."""

    model_type: ClassVar[str] = "deepseek_v2"
