"""What `moescale doctor` finds on machines that lack something, and what it says to do about it."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moescale.cli import main
from moescale.errors import ConfigError
from moescale.tools import doctor
from moescale.tools.doctor import Finding, compared, examine

Usage = namedtuple("Usage", "total used free")


def found(name: str, findings) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_what_runs_there_and_no_check_fails(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    assert caught.value.code == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["status"] for finding in findings} <= {"ok", "note"}
    gpu = next(finding for finding in findings if finding["name"] == "GPU")
    assert gpu["status"] == "note" and gpu["remedy"]


def test_every_finding_that_is_not_ok_has_a_remedy():
    for finding in examine(measure=False):
        assert bool(finding.remedy) == (finding.status != "ok"), finding


def test_an_unknown_cluster_is_named_before_anything_is_examined():
    with pytest.raises(ConfigError, match="cluster 'h2000' is not known"):
        next(examine(cluster="h2000"))


def test_a_folder_that_cannot_be_written_is_a_problem_and_ends_with_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--no-measure", "--output", str(tmp_path / "runs" / "first")])
    assert caught.value.code == 2
    streams = capsys.readouterr()
    assert f"{tmp_path} cannot be written" in streams.out
    assert "doctor: disk" in streams.err


def test_a_folder_below_a_file_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    assert doctor._disk(tmp_path / "file" / "run").status == "problem"


@pytest.mark.parametrize(("free", "status"), [(20e9, "note"), (900e9, "ok")])
def test_a_disk_too_small_for_checkpoints_of_large_models_is_noted(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(1e12, 0, free))
    assert found("disk", doctor.host(tmp_path)).status == status


def test_few_open_files_are_a_warning_with_the_command_for_more(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 4096))
    finding = found("open files", doctor.host(tmp_path))
    assert finding.status == "warning" and "ulimit -n" in finding.remedy


class OneGpu:
    """Stands for torch.cuda with one GPU."""

    def __init__(self, capability=(9, 0), free=79 * 2**30):
        self.capability, self.free = capability, free

    def patch(self, monkeypatch):
        properties = namedtuple("Properties", "name major minor")("a GPU", *self.capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: self.capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, 80 * 2**30))


@pytest.mark.parametrize(
    ("gpu", "status", "detail"),
    [
        (OneGpu(), "ok", "79.0 of 80.0 GiB free"),
        (OneGpu(free=60 * 2**30), "warning", "plans count on all of it"),
        (OneGpu(capability=(7, 5)), "warning", "capability 7.5 is below 8.0"),
    ],
)
def test_a_gpu_that_is_old_or_in_use_is_a_warning(monkeypatch, gpu, status, detail):
    gpu.patch(monkeypatch)
    finding = found("GPU 0", doctor.gpus())
    assert finding.status == status and detail in finding.detail


def test_an_installed_extra_that_does_not_load_is_a_warning(monkeypatch):
    OneGpu().patch(monkeypatch)
    monkeypatch.setattr(doctor, "_version", lambda _: "0.6.5")
    monkeypatch.setitem(sys.modules, "quack", None)  # importing it raises ImportError
    finding = found("CuTe for experts", doctor.extras())
    assert finding.status == "warning" and "does not load (ModuleNotFoundError" in finding.detail


def test_an_installed_extra_that_loads_is_ok(monkeypatch):
    OneGpu().patch(monkeypatch)
    monkeypatch.setattr(doctor, "_version", lambda _: "0.6.5")
    for name in ("quack", "moescale.kernels.experts.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert found("CuTe for experts", doctor.extras()).status == "ok"


@pytest.mark.parametrize(
    ("rates", "expected", "status", "detail"),
    [
        ([700.0, 690.0], 710.0, "ok", "98% of the cluster file's 710"),
        ([700.0, 690.0], None, "ok", "700 690 TFLOP/s"),
        ([700.0, 420.0], 710.0, "warning", "GPU 1 is slower than the others"),
        ([500.0, 505.0], 710.0, "warning", "predictions would be off by as much"),
        ([900.0], 710.0, "warning", "127% of the cluster file's 710"),
    ],
)
def test_rates_are_compared_with_each_other_and_with_the_cluster_file(rates, expected, status, detail):
    finding = compared("GEMM", rates, expected, "TFLOP/s")
    assert finding.status == status and detail in finding.detail


def test_gpus_that_cannot_read_each_other_are_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    (finding,) = doctor.peers(None, measure=False)
    assert finding.status == "warning" and "GPU 0 cannot read GPU 2 (2 of 6 pairs)" in finding.detail


@pytest.mark.gpu
def test_this_machine_is_fit_and_like_its_cluster_file():
    name = "h200" if "H200" in torch.cuda.get_device_name() else "h100-sxm"
    findings = list(examine(cluster=name, output=Path.cwd()))
    assert all(finding.status != "problem" for finding in findings), findings
    assert found("GEMM rate", findings).status == "ok", findings
    assert found("memory rate", findings).status == "ok", findings
