"""The configuration of a decoder with multi-head latent attention. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.config import ModelConfig, YarnConfig
from moescale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(ModelConfig):
    """A decoder whose attention is that of DeepSeek-V2 (arXiv:2405.04434, section 2.1)."""

    q_lora_rank: int | None
    """Rank of the compressed query, or None for one full projection."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    """Bias on the q_a, kv_a and output projections, as the published code has it."""
    yarn: YarnConfig | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ConfigError(f"model.q_lora_rank ({self.q_lora_rank}) must be positive, or None for a full projection")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE rotates pairs")
        if self.yarn is not None and self.rope_theta <= 1:
            raise ConfigError(
                f"model.rope_theta ({self.rope_theta}) must be above 1 with YaRN, which divides by its logarithm"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_heads * (self.qk_head_dim + self.v_head_dim)
