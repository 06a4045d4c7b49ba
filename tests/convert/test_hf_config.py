"""config.json in both spellings, and every way it can be wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from transformers import DeepseekV2Config, GenerationConfig

from moescale.config import YarnConfig
from moescale.convert.hf_config import PRESETS, parse_hf_config, read_model_config, resolve_model, to_hf_config
from moescale.errors import ConfigError
from tiny import tiny_config

YARN = YarnConfig(
    factor=40.0, original_max_sequence_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.5
)


def document(**changes):
    return to_hf_config(tiny_config()) | changes


def yarn(**changes):
    return {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64} | changes


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
        ({"model_type": "deepseek_v9"}, r"model_type \('deepseek_v9'\) is not supported; it must be 'deepseek_v2'"),
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
        ({"norm_topk_prob": "false"}, r"norm_topk_prob \('false'\) must be true or false, not a text"),
        ({"attention_bias": "true"}, r"attention_bias \('true'\) must be true or false, not a text"),
        ({"tie_word_embeddings": 0}, r"tie_word_embeddings \(0\) must be true or false, not an integer"),
        ({"seq_aux": "yes"}, r"seq_aux \('yes'\) must be true or false"),
        ({"hidden_size": 192.5}, r"hidden_size \(192.5\) must be an integer, not a number with a fraction"),
        ({"hidden_size": "192"}, r"hidden_size \('192'\) must be an integer, not a text"),
        ({"num_hidden_layers": True}, r"num_hidden_layers \(True\) must be an integer, not a truth value"),
        ({"q_lora_rank": [8]}, r"q_lora_rank \(a list\) must be an integer, not a list"),
        ({"first_k_dense_replace": -1}, r"first_k_dense_replace \(-1\) must not be negative"),
        ({"hidden_size": -192}, r"hidden_size \(-192\) must not be negative"),
        ({"n_group": -1}, r"n_group \(-1\) must not be negative"),
        ({"rope_theta": "10000"}, r"rope_theta \('10000'\) must be a number, not a text"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps \('1e-6'\) must be a number, not a text"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps .* must be finite"),
        ({"aux_loss_alpha": math.nan}, r"aux_loss_alpha \(nan\) must be finite"),
        ({"routed_scaling_factor": math.inf}, r"routed_scaling_factor \(inf\) must be finite"),
        ({"topk_method": 3}, r"topk_method \(3\) must be a text, not an integer"),
        ({"use_mla": False}, r"use_mla \(False\) is not supported; it must be True"),
        ({"num_local_experts": 4}, r"num_local_experts \(4\) and n_routed_experts \(8\) differ"),
        ({"router_aux_loss_coef": 0.5}, r"router_aux_loss_coef \(0.5\) and aux_loss_alpha \(0.01\) differ"),
        (
            {"router_aux_loss_coef": 0.5, "aux_loss_alpha": None},
            r"router_aux_loss_coef \(0.5\) and aux_loss_alpha \(None\) differ",
        ),
        ({"rope_scaling": {"factor": 4}}, r"rope_scaling.rope_type is missing beside rope_scaling.factor \(4\)"),
        ({"rope_scaling": "yarn"}, r"rope_scaling \('yarn'\) must be an object, not a text"),
        (
            {"rope_scaling": yarn(rope_type="default")},
            r"rope_type \('default'\) and rope_scaling.type \('yarn'\) differ",
        ),
        ({"rope_scaling": yarn(), "rope_theta": 1}, r"model.rope_theta \(1.0\) must be above 1 with YaRN"),
        ({"rope_scaling": yarn(factor=0)}, r"model.yarn.factor \(0.0\) must be positive"),
        ({"rope_scaling": yarn(factor=-4)}, r"model.yarn.factor \(-4.0\) must be positive"),
        ({"rope_scaling": yarn(factor="4")}, r"rope_scaling.factor \('4'\) must be a number, not a text"),
        ({"rope_scaling": yarn(beta_fast=0)}, r"model.yarn.beta_fast \(0.0\) must be positive"),
        ({"rope_scaling": yarn(mscale=math.nan)}, r"rope_scaling.mscale \(nan\) must be finite"),
        (
            {"rope_scaling": yarn(original_max_position_embeddings=64.5)},
            r"original_max_position_embeddings \(64.5\) must be an integer",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": yarn()},
            "rope_parameters and rope_scaling describe different positions; keep one",
        ),
        (
            {"rope_parameters": yarn(), "rope_scaling": yarn(factor=8)},
            "rope_parameters and rope_scaling describe different positions; keep one",
        ),
        ({"num_experts_per_tok": 9}, r"model.top_k \(9\) must be between 1 and model.num_experts \(8\)"),
    ],
)
def test_a_field_that_would_change_the_mathematics_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_hf_config(document(**changes), "folder/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": yarn(rope_type=None)},
        {"rope_scaling": yarn(rope_type="yarn", rope_theta=10000)},
        {"rope_scaling": yarn(beta_fast=None, beta_slow=None)},
        {"rope_scaling": yarn(), "rope_parameters": {"rope_type": "yarn", "beta_fast": 32.0} | yarn()},
    ],
)
def test_spellings_of_yarn_that_agree_give_it(changes):
    plain = parse_hf_config(document(rope_scaling=yarn()))
    assert plain.yarn is not None and plain.yarn.beta_fast == 32
    assert parse_hf_config(document(**changes)) == plain


def test_other_names_of_a_field_may_agree_with_it():
    changes = {"num_local_experts": 8, "router_aux_loss_coef": 0.01, "use_mla": True}
    assert parse_hf_config(document(**changes)) == tiny_config()


def test_errors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: is not JSON"):
        read_model_config(tmp_path)


def test_an_unknown_model_names_the_presets():
    with pytest.raises(ConfigError, match="'deepseek-v2-light' is neither .* did you mean 'deepseek-v2-lite'"):
        resolve_model("deepseek-v2-light")


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_autoset": True},
        {"temperature": 0.3, "top_p": 0.95, "do_sample": True, "max_length": 20},
        {"pruned_heads": {}},
        {"unsloth_version": "2025.3.1", "unsloth_fixed": True, "mlx_version": "0.1"},
    ],
)
def test_what_writers_leave_behind_is_harmless(changes):
    assert parse_hf_config(document(**changes)) == parse_hf_config(document())


def test_every_generation_field_of_transformers_is_harmless():
    fields = {name: 1 for name in GenerationConfig().to_dict()}
    assert parse_hf_config(document(**fields)) == parse_hf_config(document())


@pytest.mark.parametrize(
    ("name", "value", "suggestion"),
    [("pruned_heads", {"0": [1]}, None), ("attn_temperature", 2.0, None), ("num_hidden_layer", 3, "num_hidden_layers")],
)
def test_an_unknown_field_names_its_switch_and_only_a_close_field(name, value, suggestion):
    with pytest.raises(ConfigError, match=f"field '{name}' .*pass --ignore-config-field {name}$") as caught:
        parse_hf_config(document(**{name: value}))
    assert (f"did you mean '{suggestion}'" in str(caught.value)) == (suggestion is not None)
    assert ("did you mean" in str(caught.value)) == (suggestion is not None)
    assert parse_hf_config(document(**{name: value}), "config.json", {name}) == parse_hf_config(document())


def test_a_field_that_counts_or_is_not_there_cannot_be_ignored():
    with pytest.raises(ConfigError, match="--ignore-config-field rope_theta: it decides what is trained"):
        parse_hf_config(document(), ignored_fields=("rope_theta",))
    with pytest.raises(
        ConfigError, match="--ignore-config-field hidden_siz: .* has no such field; did you mean 'hidden_"
    ):
        parse_hf_config(document(), ignored_fields=("hidden_siz",))


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model \(' *'\) is empty; give a folder"):
        resolve_model(name)
