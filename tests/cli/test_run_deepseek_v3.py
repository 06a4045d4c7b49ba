"""DeepSeek-V3 through the whole program, from a folder with a layer for multi-token prediction and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moescale.cli import main
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.hf_config import to_hf_config
from moescale.convert.tensor_source import ModelWeights
from moescale.models.transformer import build_on_meta, initialize, named_weights
from tiny import tiny_v3_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The tests' tokenizer with a very small model, bf16 but for the biases, which are not 0."""
    source, folder = (tmp_path_factory.mktemp("v3") / name for name in ("source", "model"))
    shutil.copytree(model_folder, source)
    config = tiny_v3_config(vocab_size=512, num_prediction_layers=1)
    (source / "config.json").write_text(json.dumps(to_hf_config(config)))
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(model, seed=0)
    for number, bias in enumerate(model.buffers()):
        bias.copy_(torch.linspace(-0.01, 0.01 + number, 16))
    export_checkpoint(config, ModelWeights(named_weights(model)), folder, reference=source, dtype=torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.eh_proj.weight"] = torch.arange(64.0).view(32, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def moescale(*arguments: object) -> int | None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return 0


def test_biases_are_trained_and_what_is_not_trained_comes_back(tmp_path, folder, stdlib_corpus, capsys):
    run = ("run", "--model", folder, "--data", stdlib_corpus, "--output", tmp_path / "run", "--device", "cpu")
    options = ("--tokens-per-step", 256, "--learning-rate", 3e-3, "--router-bias-update-rate", 0.25)
    assert not moescale(*run, *options, "--steps", 2)
    assert capsys.readouterr().err.count("1 tensors for multi-token prediction in") == 1
    assert not moescale(*run, *options, "--steps", 3)
    assert "multi-token" not in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]

    assert not moescale("export", "--run", tmp_path / "run", "--output", tmp_path / "out")
    assert "multi-token prediction was not trained: its 1 tensors are those of" in capsys.readouterr().out
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in after.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in before.items()
    }
    kept = "model.layers.3.eh_proj.weight"
    assert torch.equal(after[kept], before[kept])
    for layer in (1, 2):
        key = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert after[key].dtype == torch.float32
        steps = (after[key] - before[key]) / 0.25
        # Three moves, each up or down: 3 or 1 in the end, where no load was the mean.
        assert torch.allclose(steps, steps.round(), atol=1e-5) and steps.round().abs().max() in (1, 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert torch.equal(model.model.layers[2].mlp.gate.e_score_correction_bias, after[key])
