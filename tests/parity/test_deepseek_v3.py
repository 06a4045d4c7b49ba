"""DeepSeek-V3 against transformers and the published definition: logits, losses, every gradient, and folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config as TransformersConfig
from transformers import DeepseekV3ForCausalLM

from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import parse_hf_config, read_model_config, to_hf_config, transformers_differences
from moescale.convert.tensor_source import ModelWeights
from moescale.errors import CheckpointError, ConfigError
from moescale.models.deepseek_v3.config import DeepSeekV3Config
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
    ordinary,
    run,
)
from tiny import tiny_v3_config

TINY = tiny_v3_config(initializer_std=0.2)  # wide, which keeps the router's choices far from ties
GROUPS = dict(num_groups=4, top_k_groups=2)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "moonlight": {},
    "deepseek_v3": dict(
        **GROUPS, q_lora_rank=24, yarn=dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0), num_layers=4,
        first_moe_layer=2, routed_scaling_factor=2.5,
    ),
    "groups_of_two": dict(num_groups=8, top_k_groups=3),
    "scores_as_weights": dict(normalize_topk=False),
    "one_expert_per_token": dict(top_k=1, normalize_topk=False),
    "all_experts_chosen": dict(top_k=16, routed_scaling_factor=1.0),
    "two_shared_experts_and_eps": dict(num_shared_experts=2, rms_norm_eps=1e-3, q_lora_rank=24),
    "biases_of_attention": dict(attention_bias=True, q_lora_rank=24),
    "no_dense_layer_tied": dict(num_layers=2, first_moe_layer=0, tie_embeddings=True),
    "wide_values_balanced_by_batch": dict(
        v_head_dim=40, qk_nope_head_dim=8, qk_rope_head_dim=16, aux_loss_per_sequence=False
    ),
}  # fmt: skip
ONLY_BY_DEFINITION: dict[str, dict[str, Any]] = {
    "groups_of_one": dict(num_groups=16, top_k_groups=5),
    "every_second_layer": dict(num_layers=5, moe_layer_frequency=2),
    "no_shared_experts": dict(num_shared_experts=0),
    "mscale_alone": dict(yarn=dataclasses.replace(YARN, mscale_all_dim=0.0)),
}


def build(overrides: dict[str, Any]) -> tuple[DeepSeekV3Config, Transformer]:
    config = dataclasses.replace(TINY, **overrides)
    return config, initialized(config)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_equals_transformers(name, tmp_path):
    assert_fp32_equals_transformers(*build(CONFIGURATIONS[name]), tmp_path, DeepseekV3ForCausalLM)


@pytest.mark.parametrize("name", ordinary(CONFIGURATIONS, "moonlight", "deepseek_v3"))
def test_bf16_error_is_at_most_twice_that_of_transformers(name, tmp_path):
    assert_bf16_error_is_at_most_twice_that_of_transformers(*build(CONFIGURATIONS[name]), tmp_path)


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *ONLY_BY_DEFINITION])
def test_fp32_equals_the_published_definition_auxiliary_loss_included(name, tmp_path):
    config, model = build((CONFIGURATIONS | ONLY_BY_DEFINITION)[name] | {"aux_loss_alpha": 0.3})
    assert bool(transformers_differences(config)) == (name in ONLY_BY_DEFINITION)
    folder = export(config, model, tmp_path)
    stored = load_file(folder / "model.safetensors")
    weights = {key: value.double().requires_grad_(not key.endswith("_bias")) for key, value in stored.items()}
    tokens, targets = batch_of(config)
    document = json.loads((folder / "config.json").read_text())
    wanted_logits, wanted_loss, wanted_aux = forward(document, weights, tokens, targets)
    (wanted_loss + 0.3 * wanted_aux).backward()
    logits, loss, gradients = run(model, tokens, targets, with_aux=True)
    assert error(logits, wanted_logits.detach()) < 1e-5
    assert error(loss, wanted_loss) < 1e-5
    assert error(model(tokens, targets=targets).aux_loss, wanted_aux) < 1e-5
    assert gradients.keys() == {key for key, weight in weights.items() if weight.requires_grad}
    for key, gradient in gradients.items():
        assert error(gradient, weights[key].grad) < 1e-5, key


def test_a_folder_that_transformers_wrote_is_read(tmp_path):
    torch.manual_seed(0)
    hf_config = TransformersConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        intermediate_size=64, moe_intermediate_size=24, n_routed_experts=16, num_experts_per_tok=3, n_group=4,
        topk_group=2, first_k_dense_replace=1, initializer_range=0.2,
    )  # fmt: skip
    hf_model = DeepseekV3ForCausalLM._from_config(hf_config, attn_implementation="eager")
    for layer in hf_model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    hf_model.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert isinstance(config, DeepSeekV3Config) and config.num_groups == 4 and config.routed_scaling_factor == 2.5
    model = imported(tmp_path, config)
    tokens, _ = batch_of(config)
    with torch.no_grad():
        assert error(model(tokens).logits, hf_model(tokens).logits) < 1e-5


def imported(folder: Path, config: DeepSeekV3Config, dtype: torch.dtype = torch.float32) -> Transformer:
    model = build_on_meta(config, dtype).to_empty(device="cpu")
    import_checkpoint(folder, config, named_weights(model))
    return model


def folder_with_prediction_layer(folder: Path) -> tuple[DeepSeekV3Config, dict[str, torch.Tensor]]:
    """A bf16 folder as published: the bias in fp32, and behind the last layer one for multi-token prediction."""
    config, model = build(dict(num_prediction_layers=1))
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf_config(config)))
    export_checkpoint(
        config, ModelWeights(named_weights(model)), folder / "whole", reference=source, dtype=torch.bfloat16
    )
    tensors = load_file(folder / "whole" / "model.safetensors")
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    for name, dtype in (("eh_proj.weight", torch.bfloat16), ("mlp.gate.e_score_correction_bias", torch.float32)):
        tensors[f"model.layers.3.{name}"] = torch.randn(4, generator=generator).to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return config, tensors


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_folder_comes_back_bit_for_bit_with_its_layer_for_multi_token_prediction(tmp_path, max_shard_bytes):
    config, tensors = folder_with_prediction_layer(tmp_path)
    model = imported(tmp_path / "source", config, torch.bfloat16)
    assert model.layers[1].feed_forward.router.choice_bias.dtype == torch.float32
    report = export_checkpoint(
        config,
        ModelWeights(named_weights(model)),
        tmp_path / "out",
        reference=tmp_path / "source",
        dtype=torch.bfloat16,
        max_shard_bytes=max_shard_bytes,
    )
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
    assert report.num_shards == (1 if max_shard_bytes == 10**9 else len(list((tmp_path / "out").glob("*.safetensors"))))
    assert "its 2 tensors are those of" in report.warnings[-1]
    assert type(load(tmp_path / "out", torch.bfloat16)).__name__ == "DeepseekV3ForCausalLM"


def test_an_export_without_the_weights_of_the_prediction_layer_says_so(tmp_path):
    config, _ = folder_with_prediction_layer(tmp_path)
    model = imported(tmp_path / "source", config)
    (tmp_path / "source" / "model.safetensors").unlink()
    report = export_checkpoint(
        config,
        ModelWeights(named_weights(model)),
        tmp_path / "out",
        reference=tmp_path / "source",
        dtype=torch.float32,
    )
    assert report.warnings[-1].endswith("holds no tensors for multi-token prediction, so the export has none")


def test_layers_behind_the_last_are_refused_where_config_json_has_none(tmp_path):
    folder_with_prediction_layer(tmp_path)
    config = read_model_config(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.3\.\S+' has no place in the model"):
        imported(tmp_path / "source", dataclasses.replace(config, num_prediction_layers=0))


def test_the_public_model_has_its_published_size():
    model = build_on_meta(read_model_config("moonlight-16b-a3b"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(15.96, abs=5e-3)
    assert sum(buffer.numel() for buffer in model.buffers()) == 26 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, r"scoring_func \('softmax'\) is not supported; it must be 'sigmoid'"),
        ({"topk_method": "greedy"}, r"topk_method \('greedy'\) is not supported; it must be 'noaux_tc'"),
        ({"n_group": None}, r"field 'n_group' is missing"),
        ({"n_group": 3}, r"model.num_experts \(16\) must be divisible by model.num_groups \(3\)"),
        ({"n_group": 8, "topk_group": 1}, r"model.top_k \(3\) must not exceed the 2 experts that 1 of 8 groups hold"),
        ({"norm_topk_prob": None}, r"field 'norm_topk_prob' is missing"),
        ({"first_k_dense_replace": None}, r"field 'first_k_dense_replace' is missing"),
        ({"rope_interleave": False}, r"rope_interleave \(False\) is not supported; it must be True"),
        ({"num_mtp_layers": 1}, r"num_mtp_layers \(1\) and num_nextn_predict_layers \(0\) differ"),
        ({"num_nextn_predict_layers": -1}, r"num_nextn_predict_layers \(-1\) must not be negative"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(a dict\) is not supported"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads \(1\) must equal num_attention_heads \(2\)"),
        ({"router_bias": True}, r"field 'router_bias' \(True\) is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    document = json.loads(json.dumps(to_hf_config(TINY))) | changes
    with pytest.raises(ConfigError, match=r"^config\.json: " + message):
        parse_hf_config(document)
