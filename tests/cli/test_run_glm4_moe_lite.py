"""GLM-4.7-Flash through the whole program: trained on one rank and on two by a plan, exported, opened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moescale.convert.hf_config import read_model_config, to_hf_config
from tests.cli.whole_program import check_whole_program


@pytest.fixture(scope="module")
def glm_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The tests' tokenizer with a very small GLM, its prediction layer left out: nothing is imported here."""
    folder = tmp_path_factory.mktemp("glm") / "model"
    shutil.copytree(model_folder, folder)
    config = dataclasses.replace(
        read_model_config("tiny-glm4-moe-lite"), vocab_size=512, num_prediction_layers=0, initializer_std=0.05
    )
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    return folder


@pytest.mark.slow
def test_it_is_planned_trained_in_two_layouts_and_opened_by_transformers(tmp_path, glm_folder, stdlib_corpus):
    check_whole_program(glm_folder, stdlib_corpus, tmp_path, "Glm4MoeLiteForCausalLM")
