"""The main job from the command line: accumulation, kill and resume, stop, export."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescale import __version__
from moescale.api.run_checks import lower_limit_gib
from moescale.cli import main
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import read_model_config
from moescale.data.corpus import open_corpus
from moescale.data.prepare import PrepareSettings, prepare
from moescale.models.transformer import build_on_meta
from moescale.plan import MeshShape, ParallelPlan, Prediction, one_device_plan, save_plan
from warm_start import WarmProcess

STEPS, FEW_STEPS = 80, 20
SEQUENCES_PER_STEP = 8


def run_arguments(
    model: Path, corpus: Path, output: Path, *more: object, micro_batch: int = 8, sequences: int = SEQUENCES_PER_STEP
) -> list[str]:
    fixed = ("--model", model, "--data", corpus, "--output", output, "--learning-rate", 3e-3, "--device", "cpu")
    batch = ("--tokens-per-step", sequences * 64, "--micro-batch-sequences", micro_batch)
    return ["run", *map(str, (*fixed, *batch, *more))]


def moescale(*arguments: object) -> None:
    """Run a command in this process; anything but success is an error."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert not caught.value.code


def error_of(capsys, *arguments: object) -> str:
    """What a command in this process says that ends as one does on bad input."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    return capsys.readouterr().err


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def final_weights(output: Path) -> bytes:
    folder = max((output / "checkpoints").glob("step-*"))
    return (folder / "tensors-00000-0000.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory, model_folder, stdlib_corpus) -> Path:
    """Undisturbed."""
    output = tmp_path_factory.mktemp("straight") / "run"
    moescale(*run_arguments(model_folder, stdlib_corpus, output, "--steps", STEPS))
    return output


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, model_folder, stdlib_corpus) -> Path:
    """Undisturbed too."""
    output = tmp_path_factory.mktemp("short") / "run"
    moescale(*run_arguments(model_folder, stdlib_corpus, output, "--steps", FEW_STEPS))
    return output


def test_the_loss_falls_on_held_out_files(straight_run):
    records = [json.loads(line) for line in (straight_run / "metrics.jsonl").read_text().splitlines()]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert validation[-1] < losses(straight_run)[0] - 1.0


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_losses(tmp_path, model_folder, stdlib_corpus, short_run, accumulation):
    output = tmp_path / "run"
    micro_batch = SEQUENCES_PER_STEP // accumulation
    moescale(*run_arguments(model_folder, stdlib_corpus, output, "--steps", FEW_STEPS, micro_batch=micro_batch))
    assert losses(output) == pytest.approx(losses(short_run), rel=1e-4)


def test_a_run_killed_and_resumed_ends_with_the_same_losses_and_weights(
    tmp_path, model_folder, stdlib_corpus, short_run
):
    output = tmp_path / "run"
    arguments = run_arguments(model_folder, stdlib_corpus, output, "--steps", FEW_STEPS, "--checkpoint-every", 4)
    process = WarmProcess(arguments)
    wait_for_step(process, output, 10)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    moescale(*arguments)
    assert losses(output) == losses(short_run)
    assert final_weights(output) == final_weights(short_run)


def test_a_damaged_checkpoint_is_an_error_and_last_good_says_what_it_skips(
    tmp_path, model_folder, stdlib_corpus, capsys
):
    output = tmp_path / "run"
    arguments = run_arguments(model_folder, stdlib_corpus, output, "--checkpoint-every", 2, "--keep-checkpoints", 3)
    moescale(*arguments, "--steps", 6)
    state_file = output / "checkpoints" / "step-00000006" / "state.json"
    state_file.unlink()
    message = error_of(capsys, *arguments, "--steps", 8)
    assert "step-00000006/state.json: missing; the checkpoint is damaged; pass --resume last-good to go on" in message
    moescale(*arguments, "--steps", 8, "--resume", "last-good", "--json")
    shown = capsys.readouterr()
    assert f"skipped a damaged checkpoint: {state_file}: missing" in shown.err
    assert str(output / "checkpoints" / "aside-step-00000006") in shown.err
    summary = json.loads(shown.out)
    assert (summary["resumed_from_step"], Path(summary["checkpoint"]).name) == (4, "step-00000008")
    for folder in (output / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{}")
    assert "none of the checkpoints (3) is undamaged" in error_of(capsys, *arguments, "--resume", "last-good")


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory, stdlib_sources, model_folder) -> Path:
    """So that an epoch takes seconds."""
    folder = tmp_path_factory.mktemp("small") / "corpus"
    settings = PrepareSettings(
        source=(f"{stdlib_sources}/json_*.py",),
        tokenizer=str(model_folder),
        sequence_length=64,
        output=folder,
        validation_fraction=0.1,
        num_workers=1,
    )
    prepare(settings, progress=False)
    return folder


@pytest.mark.parametrize(("first", "then"), [pytest.param(8, 16, marks=pytest.mark.slow), (16, 8)])
def test_a_run_resumed_with_steps_of_another_size_ends_with_the_epoch(
    tmp_path, model_folder, small_corpus, capsys, first, then
):
    output = tmp_path / "run"

    def train(sequences: int, *more: object) -> dict:
        capsys.readouterr()
        options = ("--json", "--validation-sequences", 1, *more)
        moescale(*run_arguments(model_folder, small_corpus, output, *options, sequences=sequences))
        return json.loads(capsys.readouterr().out)

    num_sequences = open_corpus(small_corpus).num_sequences
    done = num_sequences // first - 3
    train(first, "--steps", done)
    summary = train(then)
    assert summary["resumed_from_step"] == done
    assert 0 <= num_sequences - done * first - summary["tokens"] // 64 < then
    again = train(then)
    assert (again["steps"], again["tokens"]) == (summary["steps"], 0)


def test_a_run_that_is_refused_leaves_the_folder_as_it_was(tmp_path, model_folder, stdlib_corpus, capsys):
    output = tmp_path / "run"
    arguments = run_arguments(model_folder, stdlib_corpus, output, "--checkpoint-every", 1, "--keep-checkpoints", 3)
    moescale(*arguments, "--steps", 3)
    before = (output / "run.json").read_text()
    message = error_of(capsys, *arguments, "--steps", 2, "--weight-decay", 0)
    assert "run.steps (2) must be at least 3, the step of the checkpoint to resume" in message
    assert (output / "run.json").read_text() == before
    assert len(list((output / "checkpoints").glob("step-*"))) == 3


def test_a_second_run_on_the_same_output_is_refused_and_the_first_goes_on(
    tmp_path, model_folder, stdlib_corpus, capsys
):
    output = tmp_path / "run"
    arguments = run_arguments(model_folder, stdlib_corpus, output, "--checkpoint-every", 1)
    process = WarmProcess([*arguments, "--steps", "100000"])
    wait_for_step(process, output, 2)
    message = error_of(capsys, *arguments, "--steps", 1)
    assert f"another process trains into it (process {process.pid} on " in message
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors


def test_a_plan_of_another_version_is_refused(tmp_path, model_folder, stdlib_corpus, capsys):
    path = tmp_path / "plan.json"
    save_plan(dataclasses.replace(one_sequence_plan(model_folder), moescale_version="0.0.1"), path)
    inputs = ("--model", model_folder, "--data", stdlib_corpus, "--output", tmp_path / "run", "--device", "cpu")
    message = error_of(capsys, "run", *inputs, "--plan", path)
    assert f"{path}: plan.moescale_version (0.0.1) must be this version's ({__version__})" in message


def test_after_out_of_memory_the_advised_limit_rules_out_the_plan_that_failed(model_folder):
    for predicted_gib in (74.7, 78.2, 100.0):
        prediction = Prediction(
            step_seconds=1.0,
            tokens_per_second=64.0,
            breakdown_seconds={},
            peak_bytes=round(predicted_gib * 2**30),
            breakdown_bytes={},
        )
        plan = dataclasses.replace(one_sequence_plan(model_folder), prediction=prediction)
        assert lower_limit_gib(plan, round(79.3 * 2**30)) <= min(predicted_gib, 79.3) - 3
    assert lower_limit_gib(one_sequence_plan(model_folder), 80 * 2**30) == 76


def one_sequence_plan(model_folder: Path) -> ParallelPlan:
    return one_device_plan(
        read_model_config(model_folder),
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
    )


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"model": 3}', '{"model'])
def test_without_a_sound_run_file_export_wants_the_model(tmp_path, model_folder, straight_run, capsys, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(straight_run / "checkpoints")
    if content is not None:
        (run / "run.json").write_text(content)
    export = ("export", "--run", run, "--output", tmp_path / "export")
    message = error_of(capsys, *export)
    assert f"{run / 'run.json'}: " in message
    assert "--model" in message
    moescale(*export, "--model", model_folder)


def test_sigterm_saves_and_leaves_with_status_75(tmp_path, model_folder, stdlib_corpus):
    output = tmp_path / "run"
    process = WarmProcess(run_arguments(model_folder, stdlib_corpus, output, "--steps", 100_000))
    wait_for_step(process, output, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM after step" in errors
    step = len(losses(output))
    assert (output / "checkpoints" / f"step-{step:08d}" / "state.json").is_file()


def test_the_export_computes_the_same_in_transformers(tmp_path, model_folder, straight_run):
    export = tmp_path / "export"
    moescale("export", "--run", straight_run, "--output", export, "--dtype", "fp32", "--max-shard-gigabytes", 0.0001)
    assert len(list(export.glob("*.safetensors"))) > 1
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(export)("def main():\n    return", return_tensors="pt").input_ids
    ours = build_on_meta(read_model_config(export), torch.float32).to_empty(device="cpu")
    import_checkpoint(export, ours.config, dict(ours.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, reference(tokens).logits, rtol=1e-5, atol=1e-5)


def wait_for_step(process: WarmProcess, output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").is_file() and len(losses_so_far(output)) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached; status {process.poll()}")


def losses_so_far(output: Path) -> list[str]:
    return [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize("seed", [1_750_000_000_000_000_000, -(2**63), 2**63 - 1])
def test_any_seed_of_64_bits_starts_a_run(tmp_path, model_folder, stdlib_corpus, seed):
    arguments = run_arguments(model_folder, stdlib_corpus, tmp_path / "run", f"--seed={seed}")
    moescale(*arguments, "--steps", 1)


@pytest.mark.parametrize("option", ["--tokens-per-step", "--micro-batch-sequences"])
def test_zero_is_not_taken_for_the_default(tmp_path, model_folder, stdlib_corpus, capsys, option):
    inputs = ("run", "--model", model_folder, "--data", stdlib_corpus, "--output", tmp_path / "run")
    message = error_of(capsys, *inputs, option, 0)
    assert f"run.{option[2:].replace('-', '_')} (0) must be positive" in message


def test_weights_that_are_not_finite_are_named_before_a_step(tmp_path, model_folder, stdlib_corpus, capsys):
    moescale(*run_arguments(model_folder, stdlib_corpus, tmp_path / "run"), "--steps", 1)
    moescale("export", "--run", tmp_path / "run", "--output", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][3, 0] = float("nan")  # of a token that may never be seen
    save_file(weights, path, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        main(run_arguments(tmp_path / "model", stdlib_corpus, tmp_path / "run", "--skip-nonfinite"))
    assert caught.value.code == 3
    message = " ".join(capsys.readouterr().err.split())
    assert f"{path}: tensor 'model.embed_tokens.weight' has values that are not finite" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_more_ranks_than_a_machines_cores_can_serve_are_not_started(tmp_path, model_folder, stdlib_corpus, capsys):
    plan = one_device_plan(
        read_model_config(model_folder),
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
    )
    mesh = MeshShape(dp_shard=512)
    plan = dataclasses.replace(plan, mesh=mesh, plan_gpus=512, runtime_gpus=512, tokens_per_step=512 * 64)
    save_plan(plan, tmp_path / "plan.json")
    inputs = ("run", "--model", model_folder, "--data", stdlib_corpus, "--output", tmp_path / "run")
    message = error_of(capsys, *inputs, "--plan", tmp_path / "plan.json", "--device", "cpu")
    assert "plan.runtime_gpus (512) exceeds the" in message and "compile a plan for fewer" in message
    assert not (tmp_path / "run" / "logs").exists()
