"""OLMoE through the whole program: trained on one rank and on two by a plan, exported, opened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moescale.convert.hf_config import read_model_config, to_hf_config
from tests.cli.whole_program import check_whole_program


@pytest.fixture(scope="module")
def olmoe_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The tests' tokenizer with a very small OLMoE."""
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    shutil.copytree(model_folder, folder)
    config = dataclasses.replace(
        read_model_config("tiny-olmoe"),
        vocab_size=512,
        hidden_size=32,
        num_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        expert_intermediate_size=24,
        dense_intermediate_size=24,
        num_experts=8,
        top_k=2,
        aux_loss_alpha=0.01,
        initializer_std=0.05,
    )
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    return folder


@pytest.mark.slow
def test_it_is_planned_trained_in_two_layouts_and_opened_by_transformers(tmp_path, olmoe_folder, stdlib_corpus):
    check_whole_program(olmoe_folder, stdlib_corpus, tmp_path, "OlmoeForCausalLM")
