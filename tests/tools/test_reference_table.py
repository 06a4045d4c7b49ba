"""The reference's performance table: what is published, what stands next to it, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moescale.errors import ConfigError
from moescale.planner.cluster import load_cluster
from moescale.tools.reference_table.plot import check_plot, draw_reference
from moescale.tools.reference_table.published import read_published
from moescale.tools.reference_table.rows import reference_rows
from moescale.tools.reference_table.text import reference_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H100 = load_cluster("h100-sxm")
EXPERTS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "rows": [
        {"scope": scope, "routing": routing, "backend": backend, "top_k": 6, "tokens": 2048, "num_experts": 8}
        | {"forward_ms": 0.4, "backward_ms": 0.6}
        for scope, routing, backend in (
            ("mlp", "uniform", "dense"),
            ("mlp", "uniform", "triton"),
            ("mlp", "uniform", "reference_published"),
            ("mlp", "skewed", "triton"),
            ("layer", "uniform", "triton"),
        )
    ],
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return reference_rows(H100, RESULTS)


def rows_of(document: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [row for row in document["grouped_gemm"] if row["what"] == what]


def test_published_times_give_the_published_mfu_with_six_experts_a_token_and_not_with_eight():
    table, peak = read_published().grouped_gemm, read_published().peak_flops_per_second
    for top_k, agrees in ((6, True), (8, False)):
        shape = dataclasses.replace(table, top_k=top_k)
        for row in table.rows:
            mfu = 3 * shape.forward_flops(row) / (row.forward_ms + row.backward_ms) / 1e-3 / peak
            assert (abs(mfu - row.mfu) < 0.001) is agrees
    step = read_published().step
    assert step.mfu_at(step.tokens / step.seconds / step.gpus, peak) == pytest.approx(step.mfu, abs=0.005)


def test_rows_are_the_published_ones_in_their_order_each_with_every_contender(document):
    sizes = [(4096, 64), (2048, 32), (8192, 64), (2048, 16), (16384, 64), (2048, 8)]
    assert [(row["tokens"], row["num_experts"]) for row in rows_of(document, "published")] == sizes
    for size in sizes:
        found = [row for row in document["grouped_gemm"] if (row["tokens"], row["num_experts"]) == size]
        backends = [row["backend"] for row in found if row["what"] == "measured"]
        assert backends == ["grouped_mm", "triton", "cute", "dense"]
        assert [row["what"] for row in found] == ["published", *["measured"] * 4, "predicted", "limit"]


def test_measured_rows_are_those_of_the_result_files(document):
    stored = {
        (row["tokens"], row["num_experts"], row["backend"]): row
        for row in json.loads((RESULTS / "h200" / "experts.json").read_text())["rows"]
        if (row["scope"], row.get("routing")) == ("mlp", "uniform")
    }
    for row in rows_of(document, "measured"):
        source = stored[row["tokens"], row["num_experts"], row["backend"]]
        assert (row["forward_ms"], row["backward_ms"]) == (source["forward_ms"], source["backward_ms"])
        assert row["tflops"] == pytest.approx(source["tflops"], rel=1e-3)
        assert (row["gpu"], row["from"]) == ("NVIDIA H200", "h200/experts.json")
    steps = {row["from"]: row for row in document["step"] if row["what"] == "measured"}
    whole = json.loads((RESULTS / "h100x2" / "whole.json").read_text())
    assert steps["h100x2/whole.json"]["gpus"] == 2
    assert steps["h100x2/whole.json"]["tokens_per_second_per_gpu"] == pytest.approx(whole["tokens_per_second"] / 2)
    assert steps["h200/step.json"]["gpus"] == 1


def test_the_prediction_is_the_planners_for_the_published_job_and_no_faster_than_the_limit(document):
    from moescale.api.compile import compile
    from moescale.api.compile_settings import CompileSettings

    settings = CompileSettings(model="deepseek-coder-v2-lite", cluster="h100-sxm", plan_gpus="4", runtime_gpus=8)
    predicted, limit = document["step"][-2:]
    assert (predicted["what"], limit["what"]) == ("predicted", "limit")
    assert predicted["step_seconds"] == compile(settings).plan().prediction.step_seconds
    assert limit["mfu"] == pytest.approx(1) and limit["step_seconds"] < predicted["step_seconds"]
    for row, least in zip(rows_of(document, "predicted"), rows_of(document, "limit"), strict=True):
        assert least["forward_ms"] < row["forward_ms"] and least["backward_ms"] < row["backward_ms"]


def test_few_rows_per_expert_are_limited_by_memory_and_many_by_arithmetic():
    table = read_published().grouped_gemm
    few, many = (dataclasses.replace(table.rows[0], tokens=tokens) for tokens in (64, 65536))
    weights = 2 * 3 * 64 * 2048 * 1408
    assert table.limit_ms(few, 1e15, 1e12)[0] == pytest.approx(1e3 * (weights + 2 * 2 * 64 * 6 * 2048) / 1e12)
    assert table.limit_ms(many, 1e15, 1e12) == pytest.approx(
        tuple(1e3 * share * table.forward_flops(many) / 1e15 for share in (1, 2))
    )


def test_without_results_the_measured_rows_are_left_out_and_the_text_says_how_to_get_them():
    document = reference_rows(H100, None)
    assert {row["what"] for row in document["grouped_gemm"]} == {"published", "predicted", "limit"}
    assert "Nothing measured: give --results a folder with experts.json" in reference_text(document)


def test_results_of_ones_own_are_the_expert_mlp_with_uniform_routing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "experts.json").write_text(json.dumps(EXPERTS))
    measured = rows_of(reference_rows(H100, tmp_path), "measured")
    assert [(row["backend"], row["from"]) for row in measured] == [
        ("triton", "mine/experts.json"),
        ("dense", "mine/experts.json"),
    ]
    assert measured[0]["mfu"] == pytest.approx(18 * 2048 * 6 * 2048 * 1408 / 1e-3 / 989e12)


def test_a_gpu_whose_rate_is_not_known_has_times_and_no_mfu(tmp_path):
    (tmp_path / "experts.json").write_text(json.dumps(EXPERTS | {"gpu": "NVIDIA Nothing"}))
    document = reference_rows(H100, tmp_path)
    assert {row["mfu"] for row in rows_of(document, "measured")} == {None}
    assert any("Triton" in line and " - " in line for line in reference_text(document).splitlines())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda document: document.pop("gpu"), "gpu"),
        (lambda document: document.update(rows={}), "rows"),
        (lambda document: document["rows"][0].update(forward_ms=0), r"forward_ms \(0\) must be positive"),
        (lambda document: document["rows"][1].update(tokens="8"), r"tokens \('8'\) must be of type int"),
    ],
)
def test_a_damaged_result_is_an_error_that_names_file_and_field(tmp_path, damage, message):
    document = json.loads(json.dumps(EXPERTS))
    damage(document)
    (tmp_path / "experts.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=f"experts.json: {message}.* `moescale bench experts --output FILE`"):
        reference_rows(H100, tmp_path)


def test_where_the_job_does_not_fit_the_row_says_by_how_much():
    small = dataclasses.replace(H100, name="small", memory_bytes=20_000_000_000, host_memory_bytes=1_000_000_000)
    document = reference_rows(small, None)
    predicted = document["step"][-2]
    assert predicted["step_seconds"] is None and predicted["mfu"] is None
    assert "small: nothing fits, exceeds GPU memory by" in predicted["from"]
    assert "nothing fits" in reference_text(document)


def test_the_text_has_a_line_for_every_row(document):
    text = reference_text(document)
    lines = [line for line in text.splitlines() if line.startswith("│ ")]
    assert len(lines) == len(document["step"]) + len(document["grouped_gemm"])
    assert max(map(len, lines)) <= 110
    cells = [cell.strip() for cell in lines[5].strip("│").split("│")]
    assert cells == ["4096", "64", "3.190", "6.363", "13.5%", "published", "the reference", "H100"]


def test_a_picture_shows_every_contender_and_is_the_same_each_time(document, tmp_path):
    for name in ("one.svg", "two.svg"):
        draw_reference(document, tmp_path / name)
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text()
    for text in ("the reference (H100)", "moescale, CuTe (H200)", "predicted (H100)", "31,185", "16,384 tokens"):
        assert f">{text}<" in svg
    with pytest.raises(ConfigError, match=r"--plot \(table.doc\) must end in .svg, .png, .pdf"):
        check_plot(Path("table.doc"))


def test_the_table_needs_no_torch():
    code = (
        "import sys; from moescale.tools.reference_table import plot, rows; import moescale.cli.bench; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
