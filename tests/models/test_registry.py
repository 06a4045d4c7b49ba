"""Every family declares what planner, conversion and runtime ask for, and says so without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moescale.convert.hf_config import PRESETS, parse_hf_config, read_model_config, to_hf_config
from moescale.errors import ConfigError
from moescale.models.registry import FAMILIES, family_of, find_family
from moescale.models.transformer import build_on_meta
from moescale.operators import operator
from moescale.planner.workload import build_workload

CONFIGS = {name: read_model_config(name) for name in PRESETS}


def test_every_family_has_a_preset_that_the_tests_below_look_at():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_survives_its_own_config_json(name):
    config = CONFIGS[name]
    document = to_hf_config(config)
    assert document["model_type"] == config.model_type
    assert parse_hf_config(document) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layers_are_the_models_and_every_operator_is_registered(name):
    config = CONFIGS[name]
    family = family_of(config)
    layers = family.layers(config)
    assert sum(kind.count for kind in layers) == config.num_layers
    for listed in (*(kind.operators for kind in layers), family.outside):
        assert all(operator(one).name == one for one in listed)
    model = build_on_meta(config, torch.bfloat16)
    assert build_workload(config).parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"model_type \('deepseek_v9'\) is not supported; it must be 'deepseek_v2'"):
        find_family("deepseek_v9")
    with pytest.raises(ConfigError, match=r"^there/config.json: model_type \(7\) is not supported"):
        parse_hf_config({"model_type": 7}, "there/config.json")
    with pytest.raises(ConfigError, match=r"model_type \(a list\) is not supported"):
        find_family([])


def test_the_registry_imports_no_torch():
    program = "import sys; import moescale.models.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
