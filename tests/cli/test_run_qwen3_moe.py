"""A second family through the whole program: trained on one rank and on two by a plan, exported, opened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moescale.convert.hf_config import read_model_config, to_hf_config
from tests.cli.whole_program import check_whole_program


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The tests' tokenizer with a very small Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    shutil.copytree(model_folder, folder)
    config = dataclasses.replace(
        read_model_config("qwen3-30b-a3b"),
        vocab_size=512,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        dense_intermediate_size=64,
        expert_intermediate_size=24,
        num_experts=8,
        top_k=2,
        max_sequence_length=256,
        initializer_std=0.05,
    )
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    return folder


def test_it_is_planned_trained_in_two_layouts_and_opened_by_transformers(tmp_path, qwen_folder, stdlib_corpus):
    check_whole_program(qwen_folder, stdlib_corpus, tmp_path, "Qwen3MoeForCausalLM")
