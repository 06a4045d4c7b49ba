"""A model configuration small enough for any test; every field can be overridden."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moescale.models.deepseek_v2.config import DeepSeekV2Config
from moescale.models.deepseek_v3.config import DeepSeekV3Config
from moescale.models.glm4_moe_lite.config import Glm4MoeLiteConfig
from moescale.models.lora import is_adapter


def tiny_config(**overrides: Any) -> DeepSeekV2Config:
    """Three layers, the first one dense, eight experts of which two are chosen."""
    fields: dict[str, Any] = dict(
        vocab_size=96,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        attention_bias=False,
        dense_intermediate_size=64,
        expert_intermediate_size=24,
        num_experts=8,
        num_shared_experts=1,
        top_k=2,
        first_moe_layer=1,
        moe_layer_frequency=1,
        routing_method="greedy",
        num_groups=1,
        top_k_groups=1,
        normalize_topk=False,
        routed_scaling_factor=1.0,
        aux_loss_alpha=0.01,
        aux_loss_per_sequence=True,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        max_sequence_length=256,
        rope_theta=10000.0,
        yarn=None,
        initializer_std=0.05,
    )
    return DeepSeekV2Config(**(fields | overrides))


def tiny_v3_config(**overrides: Any) -> DeepSeekV3Config:
    """The same with DeepSeek-V3's routing: three of sixteen experts by sigmoid and bias, in one group."""
    shared = {field.name: getattr(tiny_config(), field.name) for field in dataclasses.fields(DeepSeekV3Config)}
    routing = dict(routing_method="noaux_tc", num_experts=16, top_k=3, normalize_topk=True, routed_scaling_factor=2.446)
    return DeepSeekV3Config(**(shared | routing | overrides))


def tiny_glm_config(**overrides: Any) -> Glm4MoeLiteConfig:
    """The same as GLM-4.7-Flash has it: a compressed query, heads of one width, four experts."""
    shared = {field.name: getattr(tiny_v3_config(), field.name) for field in dataclasses.fields(Glm4MoeLiteConfig)}
    own = dict(q_lora_rank=24, v_head_dim=24, top_k=4, routed_scaling_factor=1.8, rms_norm_eps=1e-5)
    return Glm4MoeLiteConfig(**(shared | own | overrides))


def randomize_adapters(model: torch.nn.Module) -> None:
    """Give all adapters of ``model`` factors of which none is zero, the same ones every time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
