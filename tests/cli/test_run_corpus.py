"""What `run` says of its corpus: damage before the first step, columns that it does not use."""

from __future__ import annotations

import shutil

import pytest

from moescale.cli import main
from moescale.data.corpus import verification


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_corpus_is_refused_by_the_name_of_its_file(
    tmp_path, model_folder, stdlib_corpus, capsys, monkeypatch, at_once, split
):
    if not at_once:
        monkeypatch.setattr(verification, "_AT_ONCE_BYTES", 0)
    corpus = tmp_path / "corpus"
    shutil.copytree(stdlib_corpus, corpus)
    path = corpus / f"{split}-00000.bin"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # another id of the vocabulary
    path.write_bytes(content)
    arguments = ["run", "--model", model_folder, "--data", corpus, "--output", tmp_path / "run", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, [*arguments, "--micro-batch-sequences", 8])))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"{split}-00000.bin has changed: its SHA-256" in error and "Traceback" not in error


def test_columns_that_a_run_does_not_use_are_named(tmp_path, model_folder, capsys):
    datasets = pytest.importorskip("datasets", reason="of the extra `hub`")
    rows = {"input_ids": [[1, 2, 3, 4] * 4] * 4, "labels": [[-100] * 8 + [1] * 8] * 4, "source": ["a", "b", "c", "d"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    arguments = [
        "run",
        "--model",
        model_folder,
        "--data",
        tmp_path / "saved",
        "--output",
        tmp_path / "run",
        "--steps",
        1,
    ]
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, [*arguments, "--device", "cpu"])))
    assert not caught.value.code
    assert "columns that training does not use: source" in capsys.readouterr().err
