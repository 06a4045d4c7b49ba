"""GLM-4.7-Flash's architecture against transformers and the published routing: logits, loss, gradients, folders."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeLiteConfig as TransformersConfig
from transformers import Glm4MoeLiteForCausalLM

from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import parse_hf_config, read_model_config, to_hf_config
from moescale.convert.tensor_source import ModelWeights
from moescale.errors import ConfigError
from moescale.models.glm4_moe_lite.config import Glm4MoeLiteConfig
from moescale.models.transformer import Transformer, build_on_meta, named_weights
from reference import forward
from tests.parity.test_parity import (
    YARN,
    assert_bf16_error_is_at_most_twice_that_of_transformers,
    assert_fp32_equals_transformers,
    batch_of,
    error,
    export,
    initialized,
    load,
    run,
)
from tiny import tiny_glm_config

TINY = tiny_glm_config(initializer_std=0.2)  # wide, which keeps the router's choices far from ties
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "glm_4_7_flash": {},
    "full_query_two_shared_experts": dict(q_lora_rank=None, num_shared_experts=2),
    "two_dense_layers_in_groups": dict(num_layers=4, first_moe_layer=2, num_groups=4, top_k_groups=2),
    "no_dense_layer_tied": dict(num_layers=2, first_moe_layer=0, tie_embeddings=True),
    "every_layer_dense": dict(num_layers=2, first_moe_layer=2),
    "scores_as_weights": dict(normalize_topk=False, rms_norm_eps=1e-3),
    "yarn": dict(yarn=YARN),
    "biases_of_attention": dict(attention_bias=True),
    "one_expert_per_token": dict(top_k=1, normalize_topk=False),
    "balanced_by_batch": dict(aux_loss_per_sequence=False, v_head_dim=16, routed_scaling_factor=1.0),
}


def build(overrides: dict[str, Any]) -> tuple[Glm4MoeLiteConfig, Transformer]:
    config = dataclasses.replace(TINY, **overrides)
    return config, initialized(config)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_equals_transformers(name, tmp_path):
    assert_fp32_equals_transformers(*build(CONFIGURATIONS[name]), tmp_path, Glm4MoeLiteForCausalLM)


# The others are DeepSeek-V3's computation, and tested so as that.
@pytest.mark.parametrize(
    "name",
    [
        "glm_4_7_flash",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("every_layer_dense", "two_dense_layers_in_groups", "yarn")
        ),
    ],
)
def test_bf16_error_is_at_most_twice_that_of_transformers(name, tmp_path):
    assert_bf16_error_is_at_most_twice_that_of_transformers(*build(CONFIGURATIONS[name]), tmp_path)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_equals_the_published_definition_auxiliary_loss_included(name, tmp_path):
    config, model = build(CONFIGURATIONS[name] | {"aux_loss_alpha": 0.3})
    folder = export(config, model, tmp_path)
    stored = load_file(folder / "model.safetensors")
    weights = {key: value.double().requires_grad_(not key.endswith("_bias")) for key, value in stored.items()}
    tokens, targets = batch_of(config)
    document = json.loads((folder / "config.json").read_text()) | {"scoring_func": "sigmoid"}
    _, wanted_loss, wanted_aux = forward(document, weights, tokens, targets)
    (wanted_loss + 0.3 * wanted_aux).backward()
    _, loss, gradients = run(model, tokens, targets, with_aux=True)
    assert error(loss, wanted_loss) < 1e-5
    if config.num_moe_layers:
        assert error(model(tokens, targets=targets).aux_loss, wanted_aux) < 1e-5
    for key, gradient in gradients.items():
        assert error(gradient, weights[key].grad) < 1e-5, key


def test_a_folder_that_transformers_wrote_is_read_and_its_layer_for_multi_token_prediction_comes_back(tmp_path):
    torch.manual_seed(0)
    hf_config = TransformersConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
        intermediate_size=64, moe_intermediate_size=24, n_routed_experts=16, num_experts_per_tok=4,
        mlp_layer_types=["dense", "dense", "sparse"], initializer_range=0.2, num_nextn_predict_layers=1,
    )  # fmt: skip
    hf_model = Glm4MoeLiteForCausalLM._from_config(hf_config, attn_implementation="eager")
    hf_model.model.layers[2].mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    hf_model.save_pretrained(tmp_path / "fp32")
    load(tmp_path / "fp32", torch.bfloat16).save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["model.layers.3.enorm.weight"] = torch.randn(32).bfloat16()
    weights["model.layers.3.mlp.gate.e_score_correction_bias"] = torch.randn(16)
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})

    config = read_model_config(tmp_path / "source")
    assert isinstance(config, Glm4MoeLiteConfig)
    assert (config.first_moe_layer, config.num_prediction_layers, config.top_k) == (2, 1, 4)
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    import_checkpoint(tmp_path / "source", config, named_weights(model))
    tokens, _ = batch_of(config)
    with torch.no_grad():
        assert error(model(tokens).logits, load(tmp_path / "source", torch.float32)(tokens).logits) < 1e-5
    source = ModelWeights(named_weights(model))
    export_checkpoint(config, source, tmp_path / "out", reference=tmp_path / "source", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    for key, tensor in weights.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
    assert isinstance(load(tmp_path / "out", torch.bfloat16), Glm4MoeLiteForCausalLM)


def test_the_public_model_has_its_published_size_and_one_layer_for_multi_token_prediction():
    config = read_model_config("glm-4.7-flash")
    assert (config.num_layers, config.num_prediction_layers) == (47, 1)
    model = build_on_meta(config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(29.94, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_layer_types": ["dense", "sparse"]}, r"mlp_layer_types has 2 entries; it must have num_hidden_layers"),
        ({"mlp_layer_types": ["dense", "sparse", "moe"]}, r"mlp_layer_types \(a list\) must be a list of 'dense' and"),
        ({"mlp_layer_types": "dense"}, r"mlp_layer_types \('dense'\) must be a list"),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, r"mlp_layer_types\[1\] \('sparse'\) comes before a dense"),
        ({"first_k_dense_replace": 2}, r"first_k_dense_replace \(2\) and mlp_layer_types \(1 dense\) differ"),
        ({"first_k_dense_replace": 2, "mlp_layer_types": None}, r"first_k_dense_replace \(2\) without mlp_layer_types"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq \(2\) is not supported; it must be 1"),
        ({"head_dim": 16}, r"head_dim \(16\) and qk_rope_head_dim \(8\) differ"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor \(0.5\) is not supported"),
        ({"rope_interleave": False}, r"rope_interleave \(False\) is not supported"),
        ({"n_group": None}, r"field 'n_group' is missing"),
        ({"scoring_func": "softmax"}, r"scoring_func \('softmax'\) is not supported"),
        ({"use_qk_norm": True}, r"field 'use_qk_norm' \(True\) is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    document = json.loads(json.dumps(to_hf_config(TINY))) | changes
    with pytest.raises(ConfigError, match=r"^config\.json: " + message):
        parse_hf_config(document)


def test_one_dense_layer_is_what_a_folder_without_a_word_means():
    document = to_hf_config(TINY)
    del document["mlp_layer_types"], document["first_k_dense_replace"]
    assert parse_hf_config(document) == TINY
