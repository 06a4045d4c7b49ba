"""Arithmetic of training, for MFU: matrix products and causal attention, forward and backward, nothing recomputed."""

from __future__ import annotations

import torch

from moescale.config import ModelConfig

# Dense bf16 rates of the vendors' data sheets, in FLOP/s, by a part of the device's name.
_PEAK_BF16_FLOPS = (("H100", 989e12), ("H200", 989e12), ("H800", 989e12), ("B200", 2250e12), ("A100", 312e12))


def matmul_parameters_per_token(config: ModelConfig) -> int:
    """Parameters that one token is multiplied with: experts not chosen and the embedding look-up do not count."""
    hidden, heads = config.hidden_size, config.num_heads
    if config.q_lora_rank is None:
        query = hidden * heads * config.qk_head_dim
    else:
        query = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    attention = (
        query
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    num_moe = config.num_moe_layers
    dense = 3 * hidden * config.dense_intermediate_size
    moe = 0
    if config.num_experts is not None:
        chosen = config.top_k + config.num_shared_experts
        moe = 3 * hidden * config.expert_intermediate_size * chosen + hidden * config.num_experts
    output = hidden * config.vocab_size
    return config.num_layers * attention + (config.num_layers - num_moe) * dense + num_moe * moe + output


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs per token: 6 per multiplied parameter, and causal attention at half of the full square."""
    per_layer = (
        config.num_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length
    )  # 2 FLOPs, half the square
    return 6.0 * matmul_parameters_per_token(config) + 3.0 * per_layer * config.num_layers


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 rate in FLOP/s, or None where it is not known (the CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAK_BF16_FLOPS if part in name), None)
