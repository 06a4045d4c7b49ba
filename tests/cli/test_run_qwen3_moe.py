"""A second family through the whole program: trained on one rank and on two by a plan, exported, opened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moescale.cli import main
from moescale.convert.hf_config import read_model_config, to_hf_config
from moescale.plan import load_plan


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


def train(folder: Path, corpus: Path, output: Path, *ranks: str) -> list[float]:
    plan = output.with_suffix(".json")
    compiled = ("compile", "--model", folder, "--cluster", "h100-sxm", "--tokens-per-step", 512, "--precision", "fp32")
    assert not run(*compiled, "--sequence-length", 64, "--output", plan, "--pin", "micro_batch_sequences=2", *ranks)
    load_plan(plan).check_model(read_model_config(folder))
    started = ("run", "--model", folder, "--data", corpus, "--plan", plan, "--output", output, "--device", "cpu")
    assert not run(*started, "--steps", 4, "--learning-rate", 3e-3)
    records = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def run(*arguments: object) -> int | None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return 0


def test_it_is_planned_trained_in_two_layouts_and_opened_by_transformers(tmp_path, qwen_folder, stdlib_corpus):
    one = train(qwen_folder, stdlib_corpus, tmp_path / "one", "--runtime-gpus", "1")
    assert len(one) == 4 and one[-1] < one[0]
    two = train(qwen_folder, stdlib_corpus, tmp_path / "two", "--runtime-gpus", "2", "--pin", "ep=2")
    assert two == pytest.approx(one, rel=1e-4)
    assert not run("export", "--run", tmp_path / "one", "--output", tmp_path / "exported", "--dtype", "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    tokens = torch.arange(64)[None]
    assert model(tokens, labels=tokens).loss.isfinite()
