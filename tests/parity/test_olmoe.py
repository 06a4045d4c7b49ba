"""OLMoE against transformers: logits, loss and every gradient, and folders in both directions."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig as TransformersConfig
from transformers import OlmoeForCausalLM

from moescale.config import YarnConfig
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import parse_hf_config, read_model_config, to_hf_config
from moescale.errors import ConfigError
from moescale.models.olmoe.config import OlmoeConfig
from moescale.models.transformer import build_on_meta
from tests.parity.test_parity import (
    assert_bf16_error_is_at_most_twice_that_of_transformers,
    assert_fp32_equals_transformers,
    batch_of,
    error,
    export,
    initialized,
    load,
)

TINY = dataclasses.replace(
    read_model_config("tiny-olmoe"),
    vocab_size=96,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    dense_intermediate_size=24,
    expert_intermediate_size=24,
    max_sequence_length=256,
    initializer_std=0.2,
)
YARN = YarnConfig(
    factor=4.0, original_max_sequence_length=64, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared_heads_of_keys": dict(num_key_value_heads=2),
    "one_head_of_keys": dict(num_key_value_heads=1),
    "weights_of_experts_normed": dict(normalize_topk=True),
    "tied": dict(tie_embeddings=True),
    "one_expert": dict(top_k=1),
    "all_experts": dict(top_k=16, rope_theta=100.0, rms_norm_eps=1e-3),
    "one_wide_head": dict(num_heads=1, num_key_value_heads=1, head_dim=32),
    "yarn": dict(yarn=YARN, num_key_value_heads=2),
    "yarn_of_parts_of_pairs": dict(yarn=dataclasses.replace(YARN, truncate=False, factor=8.0), rope_theta=1e6),
}
ORDINARY = ("shared_heads_of_keys",)


@pytest.mark.parametrize(
    "name", [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_fp32_equals_transformers(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGURATIONS[name])
    model = initialized(config)
    with torch.no_grad():
        for layer in model.layers:  # gains of 1 would hide in which order they are
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                norm.weight.add_(torch.linspace(-0.5, 0.5, norm.weight.numel()))
    assert_fp32_equals_transformers(config, model, tmp_path, OlmoeForCausalLM)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "shared_heads_of_keys", "yarn"])
def test_bf16_error_is_at_most_twice_that_of_transformers(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGURATIONS[name], num_experts=8)
    assert_bf16_error_is_at_most_twice_that_of_transformers(config, initialized(config), tmp_path)


def test_a_folder_that_transformers_wrote_is_read_and_written_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    hf_config = TransformersConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, num_experts=16, num_experts_per_tok=4, initializer_range=0.2,
    )  # fmt: skip
    hf_model = OlmoeForCausalLM._from_config(hf_config, attn_implementation="eager")
    hf_model.save_pretrained(tmp_path / "theirs")
    config = read_model_config(tmp_path / "theirs")
    assert isinstance(config, OlmoeConfig) and config.num_key_value_heads == 2 and config.rms_norm_eps == 1e-5
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    import_checkpoint(tmp_path / "theirs", config, dict(model.named_parameters()))
    tokens, _ = batch_of(config)
    with torch.no_grad():
        assert error(model(tokens).logits, hf_model(tokens).logits) < 1e-5
    opened = load(export(config, model, tmp_path), torch.float32)
    assert isinstance(opened, OlmoeForCausalLM)
    ours, theirs = opened.state_dict(), hf_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_public_model_has_its_published_size():
    model = build_on_meta(read_model_config("olmoe-1b-7b"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(6.92, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_qkv": 8.0}, r"clip_qkv \(8.0\) is not supported; it must be None"),
        ({"attention_bias": True}, r"attention_bias \(True\) is not supported"),
        ({"num_key_value_heads": 3}, r"model.num_heads \(4\) must be divisible by model.num_key_value_heads \(3\)"),
        ({"head_dim": 16}, r"model.head_dim \(16\) must be model.hidden_size \(32\) divided by model.num_heads \(4\)"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, r"model.head_dim \(10\) must be model.hidden_size"),
        ({"num_local_experts": 8}, r"num_local_experts \(8\) and num_experts \(16\) differ"),
        ({"num_experts": None}, r"field 'num_experts' is missing"),
        ({"moe_intermediate_size": 24}, r"field 'moe_intermediate_size' \(24\) is not known"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters.rope_type \('linear'\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    document = json.loads(json.dumps(to_hf_config(TINY))) | changes
    with pytest.raises(ConfigError, match=r"^config\.json: " + message):
        parse_hf_config(document)


def test_as_many_heads_of_keys_where_their_number_is_null():
    document = to_hf_config(TINY) | {"num_key_value_heads": None}
    assert parse_hf_config(document) == TINY


def test_the_balancing_loss_is_trained_where_the_folder_asks_for_it():
    document = to_hf_config(TINY) | {"output_router_logits": True, "router_aux_loss_coef": None}
    assert parse_hf_config(document) == dataclasses.replace(TINY, aux_loss_alpha=0.01)
