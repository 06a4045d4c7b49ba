"""Rotary position tables, with YaRN context extension.

Source: the published DeepSeek-V2 modelling code and YaRN (Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4).
YaRN acts at every length, short ones included.
"""

from __future__ import annotations

import math

import torch

from moescale.config import YarnConfig
from moescale.models.latent.config import LatentAttentionConfig


def yarn_mscale(factor: float, coefficient: float) -> float:
    """Attention temperature ``0.1 * coefficient * ln(factor) + 1``; 1 where nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def softmax_scale(config: LatentAttentionConfig) -> float:
    """Factor on QK^T before the softmax: ``qk_head_dim ** -0.5``, times YaRN's temperature squared."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def rope_tables(
    config: LatentAttentionConfig, sequence_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and rotated pair, each [S, qk_rope_head_dim / 2] in fp32.

    Pair ``i`` is made of the adjacent elements ``2i`` and ``2i + 1`` (interleaved RoPE). YaRN's ratio of ``mscale`` to
    ``mscale_all_dim`` is multiplied in.
    """
    return tables(config.qk_rope_head_dim, config.rope_theta, config.yarn, sequence_length, device)


def tables(
    dim: int, theta: float, yarn: YarnConfig | None, sequence_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and of the ``dim / 2`` pairs, each [S, dim / 2] in fp32, whatever the pairs."""
    frequencies = _inverse_frequencies(dim, theta, yarn, device)
    positions = torch.arange(sequence_length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)  # [S, Dr/2]
    amplitude = 1.0
    if yarn is not None:
        amplitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return angles.cos() * amplitude, angles.sin() * amplitude


def _inverse_frequencies(dim: int, theta: float, yarn: YarnConfig | None, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    original = 1.0 / (theta**exponents)
    if yarn is None:
        return original
    low, high = _correction_range(yarn, dim, theta)
    # From pair `low` down frequencies stay as they are, from `high` up they are divided by the factor.
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    return original / yarn.factor * ramp + original * (1 - ramp)


def _correction_range(yarn: YarnConfig, dim: int, theta: float) -> tuple[float, float]:
    def pair_with(num_rotations: float) -> float:
        wavelengths = yarn.original_max_sequence_length / (num_rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high
