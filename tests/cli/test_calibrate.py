"""`moescale calibrate` without a GPU, and the format of what it writes."""

import dataclasses
import tomllib
from typing import Any

import pytest
import torch

from moescale.cli import main
from moescale.planner.cluster import load_cluster, parse_cluster
from moescale.runtime.calibrate import calibrate, to_toml
from moescale.runtime.calibrate_links import measure_links


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can be calibrated")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "--output", str(tmp_path / "mine.toml")])
    assert caught.value.code == 2
    assert "calibrate needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_an_output_that_is_a_folder_is_refused_before_anything_is_measured(command, tmp_path, monkeypatch, capsys):
    for module, name in (("moescale.runtime.calibrate", "calibrate_machine"), ("moescale.cli.bench", "_measured")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("moescale.cli.bench._require_gpu", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main([command, "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert f"--output ({tmp_path}) is a folder; name a file in it" in capsys.readouterr().err


def without_none(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """As calibrate leaves out what it did not measure; tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields if value is not None}


def test_what_is_written_is_what_compile_reads():
    cluster = load_cluster("h200")
    fields = dataclasses.asdict(cluster, dict_factory=without_none)
    assert parse_cluster(tomllib.loads(to_toml(fields)), "mine.toml") == cluster


def test_links_that_one_process_cannot_measure_are_assumed_and_said_to_be():
    tables, sources = measure_links(torch.device("cpu"), lambda _: 1.0)
    assert list(tables) == list(sources) == ["intra_node"]
    assert sources["intra_node"].startswith("assumed")


@pytest.mark.gpu
def test_a_calibrated_machine_is_a_cluster_within_its_data_sheet():
    cluster = parse_cluster(tomllib.loads(to_toml(calibrate(torch.device("cuda", 0), print))), "mine.toml")
    assert max(cluster.dense_gemm.flops_per_second) < cluster.peak_flops_per_second
    assert cluster.grouped_gemm.flops_per_second[-1] > cluster.grouped_gemm.flops_per_second[0]
    assert 0.7 < cluster.sustained_clock <= 1
