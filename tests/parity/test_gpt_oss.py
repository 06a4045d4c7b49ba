"""gpt-oss against transformers: logits, loss and every gradient, and folders in both directions, MXFP4 included."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig as TransformersConfig
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.folder_weights import FolderWeights
from moescale.convert.hf_config import parse_hf_config, read_model_config, to_hf_config, transformers_differences
from moescale.convert.mxfp4 import dequantize
from moescale.convert.stored_layout import folder_dtype
from moescale.convert.tensor_source import ModelWeights
from moescale.errors import CheckpointError, ConfigError
from moescale.models.gpt_oss.config import GptOssConfig
from moescale.models.transformer import build_on_meta, named_weights
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
    read_model_config("gpt-oss-20b"),
    vocab_size=96,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    window=8,
    windowed_layers=(0, 2),
    dense_intermediate_size=24,
    expert_intermediate_size=24,
    swiglu_limit=1.0,  # low enough that many values are clamped
    num_experts=8,
    top_k=4,
    max_sequence_length=256,
    initializer_std=0.2,
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_windows": dict(windowed_layers=()),
    "a_window_of_one_token_in_every_layer": dict(window=1, windowed_layers=(0, 1, 2)),
    "one_head_of_keys": dict(num_key_value_heads=1),
    "as_many_heads_of_keys": dict(num_key_value_heads=4),
    "no_biases_of_attention": dict(attention_bias=False),
    "another_activation": dict(swiglu_alpha=1.0, swiglu_limit=0.25),
    "published_limit_and_two_experts": dict(swiglu_limit=7.0, top_k=2),
    "plain_rope": dict(yarn=None, rope_theta=1000.0),
    "yarn_of_whole_pairs": dict(yarn=dataclasses.replace(TINY.yarn, truncate=True, factor=4.0, beta_fast=8.0)),
    "heads_wider_than_the_model": dict(head_dim=24),
    "tied": dict(tie_embeddings=True),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_equals_transformers(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGURATIONS[name])
    gradients = assert_fp32_equals_transformers(config, initialized(config), tmp_path, GptOssForCausalLM)
    for key, gradient in gradients.items():
        assert gradient.abs().sum() > 0, key


@pytest.mark.parametrize(
    "name",
    [
        "published_limit_and_two_experts",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "no_windows")),
    ],
)
def test_bf16_error_is_at_most_twice_that_of_transformers(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGURATIONS[name])
    assert_bf16_error_is_at_most_twice_that_of_transformers(config, initialized(config), tmp_path)


def test_a_folder_that_transformers_wrote_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    hf_config = TransformersConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=24, num_local_experts=8, num_experts_per_tok=4, sliding_window=8, max_position_embeddings=256,
        initializer_range=0.2,
    )  # fmt: skip
    hf_model = GptOssForCausalLM._from_config(hf_config, attn_implementation="eager")
    hf_model.save_pretrained(tmp_path / "theirs")
    config = read_model_config(tmp_path / "theirs")
    assert isinstance(config, GptOssConfig) and config.windowed_layers == (0,) and not config.yarn.truncate
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    import_checkpoint(tmp_path / "theirs", config, dict(model.named_parameters()))
    tokens, _ = batch_of(config)
    with torch.no_grad():
        assert error(model(tokens).logits, hf_model(tokens).logits) < 1e-5
    weights = ModelWeights(named_weights(model))
    export_checkpoint(config, weights, tmp_path / "ours", reference=tmp_path / "theirs", dtype=torch.float32)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_parts_of_stacked_experts_are_those_of_the_whole(tmp_path):
    """Ranks read their experts, or part of each."""
    model = initialized(TINY)
    folder = export(TINY, model, tmp_path)
    weights = named_weights(model)
    parts = {name: tuple(slice(0, size) for size in weight.shape) for name, weight in weights.items()}
    name = "layers.1.feed_forward.experts."
    parts[name + "gate_up"] = (slice(2, 5), slice(20, 30), slice(8, 32))
    parts[name + "down"] = (slice(7, 8), slice(0, 32), slice(3, 9))
    parts[name + "gate_up_bias"] = (slice(1, 3), slice(23, 26))
    read = {name: torch.empty([s.stop - s.start for s in part]) for name, part in parts.items()}
    import_checkpoint(folder, TINY, read, parts=parts)
    for name, part in parts.items():
        assert torch.equal(read[name], weights[name].detach()[part]), name


def packed_folder(tmp_path, *, rows=48, columns=32):
    """A folder like the published ones: experts in MXFP4, of random blocks, everything else in bf16."""
    config = dataclasses.replace(TINY, hidden_size=64, expert_intermediate_size=32, dense_intermediate_size=32)
    folder = export(config, initialized(config), tmp_path)
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, length = tensors.pop(key).shape
        shape = (experts, length, width // 32)
        tensors[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(
        json.dumps(document | {"torch_dtype": "bfloat16", "quantization_config": quantization})
    )
    return config, folder, tensors


def test_experts_in_mxfp4_are_read_as_transformers_reads_them_and_exported_whole(tmp_path):
    config, folder, tensors = packed_folder(tmp_path)
    assert read_model_config(folder) == config and folder_dtype(folder) == torch.bfloat16
    model = build_on_meta(config, torch.bfloat16).to_empty(device="cpu")
    import_checkpoint(folder, config, dict(model.named_parameters()))
    by_parameter = FolderWeights(folder, config, torch.bfloat16)
    for name, weight in named_weights(model).items():
        assert torch.equal(by_parameter.read(name), weight), name
    assert torch.equal(by_parameter.read(name := "layers.0.feed_forward.experts.down", 3), model.get_parameter(name)[3])
    weights = ModelWeights(named_weights(model))
    report = export_checkpoint(config, weights, tmp_path / "whole", reference=folder, dtype=torch.bfloat16)
    assert [warning for warning in report.warnings if "MXFP4" in warning and "bfloat16" in warning]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    packed = [key.removesuffix("_blocks") for key in tensors if key.endswith("_blocks")]
    assert len(packed) == 2 * config.num_layers
    for key in packed:
        assert torch.equal(
            whole[key], convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"])
        ), key
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    hf_model = load(tmp_path / "whole", torch.bfloat16)
    assert torch.equal(
        hf_model.model.layers[0].mlp.experts.gate_up_proj, whole["model.layers.0.mlp.experts.gate_up_proj"]
    )


def test_every_code_at_every_scale_is_dequantised_as_by_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    ours = dequantize(blocks, scales)
    theirs = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert torch.equal(ours[:, :255], theirs[:, :255])
    assert ours[:, 255].isnan().all()  # 255 is NaN by the specification
    assert ours[0, 127].unique().tolist() == sorted({s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)})


def test_scales_that_are_missing_and_bytes_in_other_places_are_refused(tmp_path):
    config, folder, tensors = packed_folder(tmp_path)
    parameters = dict(build_on_meta(config, torch.bfloat16).to_empty(device="cpu").named_parameters())
    key = "model.layers.0.mlp.experts.down_proj"
    save_file({k: t for k, t in tensors.items() if k != f"{key}_scales"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks tensor '{key}_scales'"):
        import_checkpoint(folder, config, parameters)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has dtype torch.uint8"):
        import_checkpoint(folder, config, parameters)


def test_the_public_model_has_its_published_size():
    config = read_model_config("gpt-oss-20b")
    model = build_on_meta(config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(20.91, abs=5e-3)
    assert config.windowed_layers == tuple(range(0, 24, 2)) and config.yarn.factor == 32


def test_the_auxiliary_loss_is_that_of_its_definition():
    """Switch Transformer (arXiv:2101.03961), equations 4 to 6: E times the sum of shares of rows and of probability."""
    config = dataclasses.replace(TINY, aux_loss_alpha=0.1)
    model = initialized(config)
    tokens, _ = batch_of(config)
    probabilities = []
    for block in model.layers:
        block.feed_forward.router.register_forward_pre_hook(
            lambda router, inputs: probabilities.append((inputs[0] @ router.weight.T + router.bias).softmax(-1))
        )
    aux_loss = model(tokens).aux_loss
    expected = torch.zeros(())
    for layer in probabilities:
        chosen = torch.zeros_like(layer).scatter(1, layer.topk(config.top_k).indices, 1.0)
        expected = expected + config.num_experts * (chosen.mean(0) / config.top_k * layer.mean(0)).sum()
    assert error(aux_loss, expected) < 1e-6
    assert transformers_differences(config)


def test_the_configuration_comes_back_from_what_is_written():
    for changes in CONFIGURATIONS.values():
        config = dataclasses.replace(TINY, **changes)
        assert parse_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 1}, r"model.top_k \(1\) must be at least 2"),
        ({"sliding_window": None}, r"field 'sliding_window' is missing"),
        ({"sliding_window": 0}, r"model.window \(0\) must be positive"),
        ({"layer_types": ["full_attention"]}, r"layer_types \(a list\) must be a list of num_hidden_layers \(3\)"),
        ({"layer_types": ["full_attention", "chunked", "full_attention"]}, r"layer_types\[1\] \('chunked'\)"),
        ({"hidden_act": "gelu"}, r"hidden_act \('gelu'\) is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout \(0.1\) is not supported"),
        ({"swiglu_limit": -1.0}, r"model.swiglu_limit \(-1.0\) must be positive"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config.quant_method \('fp8'\)"),
        ({"experts_per_token": 3}, r"experts_per_token \(3\) and num_experts_per_tok \(4\) differ"),
        ({"initial_context_length": 8192}, r"initial_context_length \(8192\) and original_max_position_embeddings"),
        ({"num_key_value_heads": 3}, r"model.num_heads \(4\) must be divisible by model.num_key_value_heads \(3\)"),
        ({"rope_scaling": None}, r"rope_scaling is missing; it must be yarn"),
        ({"num_shared_experts": 1}, r"field 'num_shared_experts' \(1\) is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    document = json.loads(json.dumps(to_hf_config(TINY))) | changes
    with pytest.raises(ConfigError, match=r"^config\.json: " + message):
        parse_hf_config(document)


def test_other_parameters_of_yarn_are_refused():
    document = json.loads(json.dumps(to_hf_config(TINY)))
    for name, value, message in (
        ("truncate", "no", r"truncate \('no'\) must be true or false"),
        ("mscale", 0.7, r"mscale \(0.7\) and mscale_all_dim"),
        ("attention_factor", 2.0, r"rope_scaling.attention_factor \(2.0\) is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_hf_config(document | {"rope_scaling": document["rope_scaling"] | {name: value}})
