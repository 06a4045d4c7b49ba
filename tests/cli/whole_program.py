"""A small model of any family through the whole program, as the tests of families call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moescale.cli import main
from moescale.convert.hf_config import read_model_config
from moescale.plan import load_plan
from warm_start import run_warm


def check_whole_program(folder: Path, corpus: Path, output: Path, name: str) -> PreTrainedModel:
    """Train on one rank and on two with divided experts, export, and open as ``name`` of transformers."""
    one = train(folder, corpus, output / "one", "--runtime-gpus", "1")
    assert len(one) == 4 and one[-1] < one[0]
    two = train(folder, corpus, output / "two", "--runtime-gpus", "2", "--pin", "ep=2")
    assert two == pytest.approx(one, rel=1e-4)
    assert not run("export", "--run", output / "one", "--output", output / "exported", "--dtype", "fp32")
    model = AutoModelForCausalLM.from_pretrained(output / "exported", dtype=torch.float32)
    assert type(model).__name__ == name
    tokens = torch.arange(64)[None]
    assert model(tokens, labels=tokens).loss.isfinite()
    return model


def train(folder: Path, corpus: Path, output: Path, *ranks: str) -> list[float]:
    plan = output.with_suffix(".json")
    compiled = ("compile", "--model", folder, "--cluster", "h100-sxm", "--tokens-per-step", 512, "--precision", "fp32")
    assert not run(*compiled, "--sequence-length", 64, "--output", plan, "--pin", "micro_batch_sequences=2", *ranks)
    load_plan(plan).check_model(read_model_config(folder))
    started = ("run", "--model", folder, "--data", corpus, "--plan", plan, "--output", output, "--device", "cpu")
    done = run_warm([*started, "--steps", 4, "--learning-rate", 3e-3], timeout=300)
    assert done.returncode == 0, done.stderr
    records = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def run(*arguments: object) -> int | None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return 0
