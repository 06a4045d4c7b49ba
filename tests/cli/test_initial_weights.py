"""Which weights a run starts from, and that it says so."""

import json
import shutil
from pathlib import Path

import pytest

from moescale.cli import main


def run(capsys: pytest.CaptureFixture, model: Path | str, corpus: Path, output: Path, *more: str) -> tuple[int, str]:
    """One step; the exit status and what standard error says."""
    with pytest.raises(SystemExit) as caught:
        paths = ["--model", str(model), "--data", str(corpus), "--output", str(output)]
        main(["run", *paths, "--steps", "1", "--device", "cpu", *more])
    return caught.value.code or 0, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", "", "convert pytorch_model.bin to safetensors"),
        ("consolidated.00.pth", "", "convert consolidated.00.pth to safetensors"),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}),
            "model-00001-of-00002.safetensors: missing",
        ),
        ("pytorch_model.bin.index.json", "{}", r"holds no *.safetensors weights"),
    ],
)
def test_a_folder_with_unusable_weights_is_refused_instead_of_trained_from_random_ones(
    name, content, message, folder, stdlib_corpus, tmp_path, capsys
):
    (folder / name).write_text(content)
    status, errors = run(capsys, folder, stdlib_corpus, tmp_path / "run")
    assert status == 2 and message in errors and "weights: random" not in errors
    status, errors = run(capsys, folder, stdlib_corpus, tmp_path / "run", "--initialize", "random")
    assert status == 0 and "weights: random, seed 0" in errors


def test_a_run_says_which_weights_it_starts_from(folder, stdlib_corpus, tmp_path, capsys):
    status, errors = run(capsys, folder, stdlib_corpus, tmp_path / "first", "--seed", "7")
    assert status == 0 and "weights: random, seed 7" in errors
    with pytest.raises(SystemExit):
        main(["export", "--run", str(tmp_path / "first"), "--output", str(tmp_path / "exported")])
    status, errors = run(capsys, tmp_path / "exported", stdlib_corpus, tmp_path / "second")
    assert status == 0 and f"weights: from {tmp_path / 'exported'}" in errors
