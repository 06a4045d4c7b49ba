"""`moescale bench`: refused without a GPU, and what it prints of a result."""

from __future__ import annotations

import json

import pytest
import torch

from moescale.cli import bench, main

ROW = {
    "scope": "mlp",
    "tokens": 8192,
    "num_experts": 64,
    "routing": "uniform",
    "backend": "reference_published",
    "forward_ms": 5.148,
    "backward_ms": 8.964,
    "tflops": 180.8,
    "peak_bytes": None,
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    return caught.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can be measured")
@pytest.mark.parametrize("options", [[], ["--json"], ["--tune"]])
def test_without_a_gpu_it_says_so_and_prints_no_result(capsys, options):
    assert run("experts", *options) == 2
    captured = capsys.readouterr()
    assert "moescale bench measures kernels on a CUDA GPU, and PyTorch sees none here" in captured.err
    assert captured.out == ""


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(bench, "_require_gpu", lambda: None)
    monkeypatch.setattr(bench, "_measured", lambda: {"commit": "abc", "rows": [ROW]})


@pytest.mark.usefixtures("with_gpu")
def test_json_goes_to_standard_output_and_to_the_file(capsys, tmp_path):
    assert not run("experts", "--json", "--output", str(tmp_path / "experts.json"))
    assert json.loads(capsys.readouterr().out) == {"commit": "abc", "rows": [ROW]}
    assert json.loads((tmp_path / "experts.json").read_text())["rows"] == [ROW]


@pytest.mark.usefixtures("with_gpu")
def test_the_table_has_every_field_and_a_dash_for_what_is_unknown(capsys):
    assert not run()
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == list(bench.COLUMNS)
    assert row.split() == ["-" if value is None else str(value) for value in ROW.values()]


@pytest.mark.usefixtures("with_gpu")
def test_an_output_folder_that_does_not_exist_is_refused_before_measuring(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_measured", lambda: pytest.fail("measured"))
    assert run("--output", str(tmp_path / "missing" / "experts.json")) == 2
    assert "lies in a folder that does not exist" in capsys.readouterr().err
