import dataclasses

import pytest

from moescale.convert.hf_config import read_model_config
from moescale.errors import ConfigError, nearest
from moescale.models.deepseek_v2.config import DeepSeekV2Config
from tiny import tiny_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 0}, r"model\.hidden_size \(0\) must be positive"),
        ({"q_lora_rank": -1}, r"model\.q_lora_rank \(-1\)"),
        ({"qk_rope_head_dim": 7}, r"model\.qk_rope_head_dim \(7\) must be even"),
        ({"num_layers": 10**6}, r"model\.num_layers \(1000000\) must be at most 1,024, more than any model has"),
        ({"num_experts": 2**62}, r"model\.num_experts \(\d+\) must be at most 4,096"),
        ({"vocab_size": 2**31}, r"model\.vocab_size \(2147483648\) must be at most 2,147,483,647"),
        ({"aux_loss_alpha": -0.1}, r"model\.aux_loss_alpha \(-0\.1\) must not be negative"),
        ({"routing_method": "noisy"}, r"model\.routing_method \('noisy'\) is not supported"),
        ({"top_k": 9}, r"model\.top_k \(9\) must be between 1 and model\.num_experts \(8\)"),
        ({"routing_method": "group_limited_greedy", "num_groups": 3}, r"must be divisible by model\.num_groups \(3\)"),
        (
            {"routing_method": "group_limited_greedy", "num_groups": 4, "top_k_groups": 5},
            r"model\.top_k_groups \(5\) must be between 1 and model\.num_groups \(4\)",
        ),
        (
            {"routing_method": "group_limited_greedy", "num_groups": 4, "top_k_groups": 1, "top_k": 3},
            r"model\.top_k \(3\) must not exceed the 2 experts",
        ),
    ],
)
def test_a_contradictory_model_is_refused_with_field_value_and_rule(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize("preset", ["tiny", "tiny-gpt-oss", "tiny-deepseek-v3", "deepseek-v2-lite"])
@pytest.mark.parametrize("value", [1e308, 1e39, 1e-320])
def test_a_number_that_fp32_does_not_hold_is_refused_in_every_field(preset, value):
    config = read_model_config(preset)
    records = [config, *(part for part in vars(config).values() if dataclasses.is_dataclass(part))]
    floats = [(record, name) for record in records for name, old in vars(record).items() if isinstance(old, float)]
    assert len(floats) >= 5
    for record, name in floats:
        with pytest.raises(ConfigError, match=rf"{name} .* must be"):
            dataclasses.replace(record, **{name: value})
            pytest.fail(name)


def test_moe_layers_follow_the_absolute_index():
    config = tiny_config(num_layers=8, first_moe_layer=3, moe_layer_frequency=2)
    assert [layer for layer in range(8) if config.is_moe_layer(layer)] == [4, 6]
    assert config.num_moe_layers == 2
    assert tiny_config(num_experts=None).num_moe_layers == 0


def test_the_fingerprint_changes_with_every_field():
    config = tiny_config()
    assert config.fingerprint() == tiny_config().fingerprint()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            other = dataclasses.replace(config, **{field.name: not value})
        elif field.name in ("top_k", "num_groups", "top_k_groups") or not isinstance(value, (int, float)):
            continue
        else:
            other = dataclasses.replace(config, **{field.name: value * 2 or 2})
        assert other.fingerprint() != config.fingerprint(), field.name


def test_a_newer_field_changes_the_fingerprint_only_where_it_differs_from_its_default():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewerConfig(DeepSeekV2Config):
        qk_norm: bool = False

    older = tiny_config()
    fields = {field.name: getattr(older, field.name) for field in dataclasses.fields(older)}
    assert NewerConfig(**fields).fingerprint() == older.fingerprint()
    assert NewerConfig(**fields, qk_norm=True).fingerprint() != older.fingerprint()


def test_nearest_names_a_close_spelling_and_nothing_far_off():
    assert nearest("lerning_rate", ["learning_rate", "steps"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", ["learning_rate"]) == ""
