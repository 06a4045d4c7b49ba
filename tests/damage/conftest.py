"""Fixtures: files that both kinds of damage are done to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moescale import cli


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, model_folder, stdlib_corpus) -> Path:
    """A model's exported adapters, with the model's config.json next to them."""
    folder = tmp_path_factory.mktemp("adapters")
    inputs = ("--model", model_folder, "--data", stdlib_corpus, "--output", folder / "run", "--device", "cpu")
    for command in (
        ("run", *inputs, "--initialize", "random", "--lora", "rank=4", "--steps", 1),
        ("export", "--run", folder / "run", "--output", folder / "adapter", "--adapter", "peft"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, command)))
        assert not caught.value.code
    shutil.copy(model_folder / "config.json", folder / "adapter" / "config.json")
    return folder / "adapter"
