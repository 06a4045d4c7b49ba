"""The reference's command line in examples/: which plan it uses, and what it hands to moescale."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from warm_start import run_warm

FOLDER = Path(__file__).parents[1] / "examples" / "deepseek_coder_v2_lite"


def script(name: str, *flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_warm(flags, script=FOLDER / name, cwd=folder, timeout=120)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plan of the reference's flags."""
    folder = tmp_path_factory.mktemp("reference")
    flags = ("--run_mode", "compile", "--plan_ngpus=4", "--runtime_ngpus=8")
    assert script("train.py", *flags, folder=folder).returncode == 0
    return folder


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--plan_ngpus=8", "--plan_ngpus (8) contradicts plan_gpus (4) of plan.json"),
        ("--runtime_ngpus=4", "--runtime_ngpus (4) contradicts runtime_gpus (8) of plan.json"),
        ("--sequence_length=1024", "--sequence_length (1024) contradicts sequence_length (2048) of plan.json"),
        ("--tokens_per_step=65536", "--tokens_per_step (65536) contradicts tokens_per_step (131072) of plan.json"),
        ("--cluster=h200", "--cluster (h200) is not the one plan.json was made for"),
    ],
)
def test_a_flag_that_contradicts_the_plan_is_refused(planned: Path, flag: str, message: str) -> None:
    done = script("train.py", flag, folder=planned)
    assert done.returncode == 2
    assert message in done.stderr and "--run_mode compile" in done.stderr


def test_flags_that_agree_with_the_plan_or_are_not_given_reach_the_run(planned: Path) -> None:
    for flags in ((), ("--plan_ngpus=4", "--runtime_ngpus=8", "--cluster=h100-sxm")):
        done = script("train.py", "--model_id", "tiny", "--dataset_path", "absent", *flags, folder=planned)
        assert done.returncode != 0 and "contradicts" not in done.stderr and "--cluster" not in done.stderr
        assert "error: " in done.stderr  # of `moescale run`: neither 8 ranks nor the corpus are there


def test_merging_is_the_export_of_a_run(tmp_path: Path) -> None:
    done = script("merge.py", "--ckpt_dir", "absent", "--output_fname", "merged", folder=tmp_path)
    assert done.returncode == 2
    assert "absent/run.json: missing; --run (absent) must be the output folder of `moescale run`" in done.stderr
