"""config.json in both spellings, and every way it can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import DeepseekV2Config

from moescale.config import YarnConfig
from moescale.convert.hf_config import PRESETS, parse_hf_config, read_model_config, resolve_model, to_hf_config
from moescale.errors import ConfigError
from tiny import tiny_config

YARN = YarnConfig(
    factor=40.0, original_max_sequence_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.5
)


def document(**changes):
    return to_hf_config(tiny_config()) | changes


@pytest.mark.parametrize("overrides", [{}, {"yarn": YARN}, {"q_lora_rank": 8, "num_shared_experts": 0}])
def test_a_written_configuration_reads_back_equal(overrides):
    config = tiny_config(**overrides)
    assert parse_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


def test_the_spelling_of_transformers_5_reads_as_the_published_one(tmp_path):
    config = tiny_config(yarn=YARN, rope_theta=5000.0, aux_loss_alpha=0.0)
    DeepseekV2Config(**to_hf_config(config)).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in stored and "rope_scaling" not in stored
    assert read_model_config(tmp_path) == config


@pytest.mark.parametrize(
    ("name", "num_layers", "top_k", "routing_method"),
    [
        ("deepseek-coder-v2-lite", 27, 6, "greedy"),
        ("deepseek-v2-lite", 27, 6, "greedy"),
        ("deepseek-v2", 60, 6, "group_limited_greedy"),
        ("tiny", 4, 4, "greedy"),
    ],
)
def test_presets_are_read_by_name(name, num_layers, top_k, routing_method):
    config = read_model_config(name)
    assert name in PRESETS
    assert (config.num_layers, config.top_k, config.routing_method) == (num_layers, top_k, routing_method)


def test_a_published_hub_name_needs_no_download_to_be_planned():
    assert read_model_config("deepseek-ai/DeepSeek-Coder-V2-Lite-Base") == read_model_config("deepseek-coder-v2-lite")


def test_reading_a_configuration_imports_no_torch():
    code = (
        "import sys; from moescale.convert.hf_config import read_model_config; read_model_config('deepseek-v2');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, r"model_type \('deepseek_v3'\) is not supported; it must be 'deepseek_v2'"),
        ({"hidden_act": "gelu"}, r"hidden_act \('gelu'\) is not supported"),
        ({"scoring_func": "sigmoid"}, r"scoring_func \('sigmoid'\) is not supported"),
        ({"topk_method": "noaux_tc"}, r"routing_method \('noaux_tc'\) is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout \(0.1\) is not supported"),
        ({"mlp_bias": True}, r"mlp_bias \(True\) is not supported"),
        ({"quantization_config": {"bits": 8}}, "quantization_config .* is not supported"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads \(1\) must equal num_attention_heads \(2\)"),
        ({"num_hidden_layers": None}, "field 'num_hidden_layers' is missing"),
        ({"num_experts_per_tok": None}, "field 'num_experts_per_tok' is missing, n_routed_experts is 8"),
        ({"routing_temperature": 2.0}, r"field 'routing_temperature' \(2.0\) is not known and may change"),
        ({"n_routed_expert": 8}, "field 'n_routed_expert' .* did you mean 'n_routed_experts'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling.type \('linear'\) is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings is missing"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "truncate": False}},
            r"rope_scaling.truncate \(False\) is not supported",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, r"rope_theta \(10000.0\) and .* differ"),
        ({"num_experts_per_tok": 9}, r"model.top_k \(9\) must be between 1 and model.num_experts \(8\)"),
    ],
)
def test_a_field_that_would_change_the_mathematics_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_hf_config(document(**changes), "folder/config.json")


def test_errors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: cannot be read"):
        read_model_config(tmp_path)


def test_an_unknown_model_names_the_presets():
    with pytest.raises(ConfigError, match="'deepseek-v2-light' is neither .* did you mean 'deepseek-v2-lite'"):
        resolve_model("deepseek-v2-light")
