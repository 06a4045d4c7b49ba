"""`moescale export`: what stops it is named with a remedy, and leaves nothing half written."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moescale import cli
from moescale.files import staged_folder
from moescale.runtime import checkpoint


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, stdlib_corpus: Path) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as caught:
        paths = ["--model", str(model_folder), "--data", str(stdlib_corpus), "--output", str(output)]
        cli.main(["run", *paths, "--steps", "1", "--device", "cpu"])
    assert not caught.value.code
    return output


def export(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Exit status and standard error, on one line."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *map(str, arguments)])
    return caught.value.code or 0, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("named", "stored", "expected"),
    [
        ({"torch_dtype": "float16"}, None, torch.float16),
        ({"dtype": "float32"}, None, torch.float32),
        ({"dtype": "float32"}, torch.bfloat16, torch.float32),
        ({}, torch.float16, torch.float16),
        ({}, None, torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_the_folder_the_run_started_from(
    named, stored, expected, finished_run, model_folder, tmp_path, capsys
):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | named))
    if stored is not None:
        save_file({"large": torch.zeros(9, dtype=stored), "small": torch.zeros(2)}, folder / "model.safetensors")
    run = shutil.copytree(finished_run, tmp_path / "run")
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"model": str(folder)}))
    assert export(capsys, "--run", run, "--output", tmp_path / "out")[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {expected}
    assert export(capsys, "--run", run, "--output", tmp_path / "other", "--dtype", "bf16")[0] == 0
    tensors = load_file(tmp_path / "other" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_damaged_checkpoint_is_named_with_the_steps_that_can_be_exported_instead(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002")
    damaged = next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    status, errors = export(capsys, "--run", run, "--output", tmp_path / "out")
    assert status == 2 and f"{damaged}: checksum differs" in errors
    assert "export the newest whole one with --step 1" in errors and "last-good" not in errors
    assert export(capsys, "--run", run, "--output", tmp_path / "out", "--step", 1)[0] == 0


@pytest.mark.parametrize("moment", ["as it is checked", "as it is read"])
def test_a_checkpoint_that_the_run_removes_meanwhile_is_said_to_be_gone(
    moment, finished_run, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    owner, name = (checkpoint, "file_digest") if moment == "as it is checked" else (checkpoint.StoredTensors, "_open")
    original = getattr(owner, name)

    def after_the_run_has_removed_it(*arguments: object) -> object:
        shutil.rmtree(run / "checkpoints" / "step-00000001", ignore_errors=True)
        return original(*arguments)

    monkeypatch.setattr(owner, name, after_the_run_has_removed_it)
    status, errors = export(capsys, "--run", run, "--output", tmp_path / "out")
    assert status == 2 and "the run has removed step 1 meanwhile; export again" in errors
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(finished_run, tmp_path, capsys):
    with largest_file(100_000):
        status, errors = export(capsys, "--run", finished_run, "--output", tmp_path / "out")
    assert status == 2 and f"{tmp_path / 'out'}: could not be written" in errors and "free space" in errors
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(finished_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    status, errors = export(capsys, "--run", finished_run, "--output", tmp_path / "file" / "x")
    assert status == 2 and f"{tmp_path / 'file' / 'x'}: could not be written" in errors
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("output", [".", "/"])
def test_a_folder_without_a_name_of_its_own_is_an_output_that_exists(
    output, finished_run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    status, errors = export(capsys, "--run", finished_run, "--output", output)
    assert status == 2 and f"{output}: already exists" in errors
    assert "exporting" not in errors, "no progress is drawn of what was refused"


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0"])
def test_a_shard_size_must_be_positive_and_finite(size, finished_run, tmp_path, capsys):
    status, errors = export(
        capsys, "--run", finished_run, "--output", tmp_path / "out", f"--max-shard-gigabytes={size}"
    )
    assert status == 2 and "export.max_shard_gigabytes (" in errors and "must be positive and finite" in errors


@pytest.mark.parametrize("text", ["", '{"model": "/so', "[]", "{}", '{"model": null}'])
def test_a_damaged_run_file_is_named_and_a_model_can_be_given_instead(
    text, finished_run, model_folder, tmp_path, capsys
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "run.json").write_text(text)
    status, errors = export(capsys, "--run", run, "--output", tmp_path / "out")
    assert status == 2 and f"{run / 'run.json'}: " in errors and "give it as --model" in errors
    status, _ = export(capsys, "--run", run, "--output", tmp_path / "out", "--model", model_folder)
    assert status == 0 and (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_that_is_no_folder_is_refused_as_such(finished_run, tmp_path, capsys):
    status, errors = export(capsys, "--run", finished_run, "--output", tmp_path / "out", "--model", "tiny")
    assert status == 2 and "export.model (tiny) is not a folder; give one with the config.json" in errors


def test_a_model_folder_that_has_gone_is_named(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"model": str(tmp_path / "gone")}))
    status, errors = export(capsys, "--run", run, "--output", tmp_path / "out")
    assert status == 2 and f"{tmp_path / 'gone'}: gone" in errors and "give its copy as --model" in errors


def test_any_other_failure_of_the_system_is_a_line_with_its_path(finished_run, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr("moescale.api.export.read_model_config", full)
    status, errors = export(capsys, "--run", finished_run, "--output", tmp_path / "out")
    assert status == 2 and "error: /somewhere: No space left on device; free space" in errors


def test_two_exports_to_one_folder_come_one_by_one(finished_run, tmp_path, capsys):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "first.txt").write_text("whole")
        status, errors = export(capsys, "--run", finished_run, "--output", tmp_path / "out")
        assert status == 2 and "out: another process is exporting to it" in errors and "wait for its end" in errors
        assert (folder / "first.txt").read_text() == "whole"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.txt"]


@pytest.mark.parametrize(
    "change",
    [{"num_experts_per_tok": 1}, {"rope_theta": 20000.0}, {"rms_norm_eps": 1e-3}, {"routed_scaling_factor": 2.0}],
)
@pytest.mark.parametrize("how", ["given", "changed"])
def test_a_model_that_is_not_the_one_that_was_trained_is_refused(
    change, how, finished_run, model_folder, tmp_path, capsys
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    other = shutil.copytree(model_folder, tmp_path / "model")
    document = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(document | change))
    options: list[object] = ["--model", other]
    if how == "changed":
        run_file = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(run_file | {"model": str(other)}))
        options = []
    status, errors = export(capsys, "--run", run, "--output", tmp_path / "out", *options)
    assert status == 2 and f"{other / 'config.json'}: describes a model with fingerprint" in errors
    assert ("leave --model out" if how == "given" else "it was changed since") in errors
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_models_folder_is_refused_by_name_and_one_inside_is_copied(
    finished_run, model_folder, tmp_path, capsys
):
    secret, model = tmp_path / "secret.txt", shutil.copytree(model_folder, tmp_path / "model")
    secret.write_text("secret")
    (model / "inside.txt").symlink_to(model / "config.json")
    (model / "notes.txt").symlink_to(secret)
    status, errors = export(capsys, "--run", finished_run, "--output", tmp_path / "out", "--model", model)
    assert status == 2 and f"{model / 'notes.txt'}: is a link to {secret}, out of the model's folder" in errors
    (model / "notes.txt").unlink()
    assert export(capsys, "--run", finished_run, "--output", tmp_path / "out", "--model", model)[0] == 0
    assert (tmp_path / "out" / "inside.txt").is_file() and not (tmp_path / "out" / "inside.txt").is_symlink()


def test_the_files_of_the_hubs_cache_are_links_to_its_blobs(finished_run, model_folder, tmp_path, capsys):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(model_folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert export(capsys, "--run", finished_run, "--output", tmp_path / "out", "--model", snapshot)[0] == 0


def test_no_weights_of_before_the_training_are_in_an_export(finished_run, model_folder, tmp_path, capsys):
    model = shutil.copytree(model_folder, tmp_path / "model")
    for name in ("flax_model.msgpack", "tf_model.h5", "last.ckpt", "pytorch_model.bin", "old.pt", "old.pth", "q4.gguf"):
        (model / name).write_text("old")
    options = ("--model", model, "--dtype", "bf16")
    assert export(capsys, "--run", finished_run, "--output", tmp_path / "out", *options)[0] == 0
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.read_bytes() == b"old"]
