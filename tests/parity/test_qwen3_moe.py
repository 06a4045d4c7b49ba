"""Qwen3-MoE against transformers: logits, loss and every gradient, and folders in both directions."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig as TransformersConfig
from transformers import Qwen3MoeForCausalLM

from moescale.config import YarnConfig
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import parse_hf_config, read_model_config, to_hf_config
from moescale.errors import ConfigError
from moescale.models.qwen3_moe.config import Qwen3MoeConfig
from moescale.models.transformer import build_on_meta
from tests.parity.test_parity import (
    assert_bf16_error_is_at_most_twice_that_of_transformers,
    assert_fp32_equals_transformers,
    batch_of,
    error,
    initialized,
)

TINY = dataclasses.replace(
    read_model_config("qwen3-30b-a3b"),
    vocab_size=96,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    dense_intermediate_size=64,
    expert_intermediate_size=24,
    num_experts=16,
    top_k=4,
    max_sequence_length=256,
    initializer_std=0.2,
)
YARN = YarnConfig(
    factor=4.0, original_max_sequence_length=64, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights_of_experts_as_they_are": dict(normalize_topk=False),
    "one_head_of_keys": dict(num_key_value_heads=1),
    "as_many_heads_of_keys": dict(num_key_value_heads=4),
    "heads_wider_than_the_model": dict(head_dim=24),
    "tied": dict(tie_embeddings=True),
    "one_expert": dict(top_k=1, normalize_topk=False),
    "yarn": dict(yarn=YARN),
    "yarn_of_parts_of_pairs": dict(yarn=dataclasses.replace(YARN, truncate=False, factor=8.0), rope_theta=1e4),
    "all_experts": dict(top_k=16, rope_theta=100.0, rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_equals_transformers(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGURATIONS[name])
    assert_fp32_equals_transformers(config, initialized(config), tmp_path, Qwen3MoeForCausalLM)


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "yarn"])
def test_bf16_error_is_at_most_twice_that_of_transformers(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGURATIONS[name], num_experts=8)
    assert_bf16_error_is_at_most_twice_that_of_transformers(config, initialized(config), tmp_path)


def test_a_folder_that_transformers_wrote_is_read(tmp_path):
    torch.manual_seed(0)
    hf_config = TransformersConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, moe_intermediate_size=24, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
        initializer_range=0.2,
    )  # fmt: skip
    hf_model = Qwen3MoeForCausalLM._from_config(hf_config, attn_implementation="eager")
    hf_model.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert isinstance(config, Qwen3MoeConfig) and config.num_experts == 16 and config.num_moe_layers == 2
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    import_checkpoint(tmp_path, config, dict(model.named_parameters()))
    tokens, _ = batch_of(config)
    with torch.no_grad():
        assert error(model(tokens).logits, hf_model(tokens).logits) < 1e-5


def test_the_public_model_has_its_published_size():
    model = build_on_meta(read_model_config("qwen3-30b-a3b"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(30.53, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"model.num_heads \(4\) must be divisible by model.num_key_value_heads \(3\)"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \(a list\) is not supported; it must be \[\]"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step \(2\) is not supported"),
        ({"use_sliding_window": True}, r"use_sliding_window \(True\) is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, r"rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters.rope_type \('linear'\)"),
        ({"num_local_experts": 8}, r"num_experts \(16\) and num_local_experts \(8\) differ"),
        ({"num_experts": None}, r"field 'num_experts' is missing"),
        ({"head_dim": 15}, r"model.head_dim \(15\) must be even"),
        ({"hidden_size": "32"}, r"hidden_size \('32'\) must be an integer, not a text"),
        ({"head_dims": 16}, r"field 'head_dims' \(16\) is not known .*did you mean 'head_dim'"),
        ({"moe_intermediate_size": None}, r"field 'moe_intermediate_size' is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    document = json.loads(json.dumps(to_hf_config(TINY))) | changes
    with pytest.raises(ConfigError, match=r"^config\.json: " + message):
        parse_hf_config(document)
