"""GEMMs in fp8 from the command line: planned, or asked for by hand, trained on one device and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moescale.cli import main

LOSSES = dict[int, float]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The model of ``model_folder`` with experts of 32 instead of 24 features, which can multiply in fp8."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"moe_intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moescale(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert not caught.value.code


def trained(model: Path, corpus: Path, output: Path, *more: object) -> LOSSES:
    fixed = ("--model", model, "--data", corpus, "--output", output, "--device", "cpu", "--learning-rate", 3e-3)
    moescale("run", *fixed, "--schedule", "constant", *more)
    records = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


BY_HAND = ("--tokens-per-step", 256, "--micro-batch-sequences", 2)


def test_a_planned_run_in_fp8_trains_as_in_bf16_but_for_rounding_and_resumes(
    tmp_path: Path, wide_folder: Path, stdlib_corpus: Path
) -> None:
    size = ("--tokens-per-step", 256, "--sequence-length", 64, "--pin", "micro_batch_sequences=2")
    pins = ("--pin", "expert_gemms=fp8", "--pin", "dense_gemms=fp8", "--pin", "offload_optimizer=false")
    for name, options in (("fp8", ("--precision", "fp8", *pins)), ("bf16", ())):
        arguments = ("--model", wide_folder, "--cluster", "h200", *size, *options)
        moescale("compile", *arguments, "--output", tmp_path / f"{name}.json")
    plan = json.loads((tmp_path / "fp8.json").read_text())
    assert (plan["compute_dtype"], plan["expert_gemms"], plan["dense_gemms"]) == ("bf16", "fp8", "fp8")
    runs = {
        name: trained(wide_folder, stdlib_corpus, tmp_path / name, "--plan", tmp_path / f"{name}.json", "--steps", 6)
        for name in ("fp8", "bf16")
    }
    assert list(runs["fp8"]) == list(runs["bf16"]) == list(range(1, 7))
    assert runs["fp8"] != runs["bf16"] and runs["fp8"][6] < runs["fp8"][1]
    assert list(runs["fp8"].values()) == pytest.approx(list(runs["bf16"].values()), rel=0.02)
    with_plan = ("--plan", tmp_path / "fp8.json")
    trained(wide_folder, stdlib_corpus, tmp_path / "resumed", *with_plan, "--steps", 3)
    assert trained(wide_folder, stdlib_corpus, tmp_path / "resumed", *with_plan, "--steps", 6) == runs["fp8"]


def test_a_run_without_a_plan_takes_fp8_by_its_precision(
    tmp_path: Path, wide_folder: Path, stdlib_corpus: Path
) -> None:
    fp8, bf16 = (
        trained(wide_folder, stdlib_corpus, tmp_path / name, *BY_HAND, "--precision", name, "--steps", 2)
        for name in ("fp8", "bf16")
    )
    assert fp8 != bf16 and list(fp8.values()) == pytest.approx(list(bf16.values()), rel=0.02)
    plan = json.loads((tmp_path / "fp8" / "run.json").read_text())["plan"]
    assert (plan["compute_dtype"], plan["expert_gemms"], plan["dense_gemms"]) == ("bf16", "fp8", "fp8")
