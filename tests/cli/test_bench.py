"""`moescale bench`: refused without a GPU, and what it prints of a result."""

from __future__ import annotations

import json

import pytest
import torch

from moescale.cli import bench, main
from moescale.kernels.experts.launch_config import load_tables, parse_table
from moescale.tools import tune_experts

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
def test_the_experts_of_any_model_are_tuned_and_other_shapes_of_the_table_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune_experts, "compile_all", lambda jobs, processes: [""] * len(jobs))
    monkeypatch.setattr(tune_experts, "random_ends", lambda shape: None)
    monkeypatch.setattr(tune_experts, "make_call", lambda *arguments: None)
    monkeypatch.setattr(tune_experts, "_measure_rounds", lambda call, launches: {launches[-1]: 1.0, launches[0]: 2.0})
    path = tmp_path / "table.json"
    assert not run("experts", "--tune", "--model", "gpt-oss-20b", "--output", str(path))
    assert "32768 rows   32 experts" in capsys.readouterr().out
    written, shipped = parse_table(json.loads(path.read_text())), load_tables()["NVIDIA H200"]
    assert len(written.entries) == len(shipped.entries)
    for old in shipped.entries:
        if (old.num_experts, old.n, old.k) in ((32, 5760, 2880), (32, 2880, 5760), (32, 2880, 2880)):
            expected = tune_experts.candidate_launches(old.kernel)[-1]
        else:
            expected = old.launch
        assert written.nearest(old.kernel, old.rows, old.num_experts, old.n, old.k) == expected


@pytest.mark.usefixtures("with_gpu")
def test_an_output_folder_that_does_not_exist_is_refused_before_measuring(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_measured", lambda: pytest.fail("measured"))
    assert run("--output", str(tmp_path / "missing" / "experts.json")) == 2
    assert "lies in a folder that does not exist" in capsys.readouterr().err


def test_the_references_table_goes_to_the_terminal_a_file_and_a_picture_without_a_gpu(capsys, tmp_path):
    assert not run("reference", "--output", str(tmp_path / "table.json"), "--plot", str(tmp_path / "table.svg"))
    text = capsys.readouterr().out
    assert "Grouped GEMMs: the routed experts of one layer" in text and "prediction and limit: cluster h100-sxm" in text
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["cluster"] == "h100-sxm" and " bench reference --output" in document["command"]
    assert (tmp_path / "table.svg").read_text().startswith("<?xml")


def test_the_references_table_is_for_the_cluster_and_results_that_are_named(capsys, tmp_path):
    row = ROW | {"backend": "triton", "top_k": 6}
    (tmp_path / "experts.json").write_text(json.dumps({"gpu": "NVIDIA H200", "rows": [row]}))
    assert not run("reference", "--cluster", "h200", "--results", str(tmp_path), "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["cluster"] == "h200"
    assert [row["backend"] for row in document["grouped_gemm"] if row["what"] == "measured"] == ["triton"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "--tune"], "--tune goes with `moescale bench experts`, not with reference"),
        (["experts", "--model", "gpt-oss-20b"], "--model goes with `moescale bench experts --tune`; leave it out"),
        (["experts", "--cluster", "h200"], "--cluster goes with `moescale bench reference`, not with experts"),
        (["--plot", "a.svg"], "--plot goes with `moescale bench reference`, not with experts"),
        (["reference", "--plot", "missing/a.svg"], "--plot (missing/a.svg) lies in a folder that does not exist"),
        (["reference", "--plot", "a.doc"], "must end in .svg, .png, .pdf"),
        (["reference", "--results", "nowhere"], "--results (nowhere) holds no experts.json; write one with"),
        (["reference", "--cluster", "h101"], "cluster 'h101' is not known"),
    ],
)
def test_an_option_that_does_not_go_with_the_table_is_refused(capsys, arguments, message):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and captured.out == ""
