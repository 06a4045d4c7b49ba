"""`moescale run --lora`: checkpoints of adapters alone, which resume bit for bit on the weights they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moescale.cli import main
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.hf_config import read_model_config
from moescale.convert.tensor_source import ModelWeights
from moescale.lora import parse_lora
from moescale.models.transformer import build_on_meta, initialize, named_weights
from moescale.plan import one_device_plan, save_plan

LORA = "rank=4,alpha=16"


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *map(str, arguments), "--device", "cpu", "--schedule", "constant", "--learning-rate", "1e-2"])
    assert not caught.value.code


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["run", *map(str, arguments), "--device", "cpu", "--schedule", "constant"])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The model's folder with weights."""
    config = read_model_config(model_folder)
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(model, seed=11)
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    weights = ModelWeights(named_weights(model))
    export_checkpoint(config, weights, folder, reference=model_folder, dtype=torch.float32)
    return folder


def batch(model: Path, corpus: Path, output: Path) -> list[object]:
    sizes = ("--tokens-per-step", 8 * 64, "--micro-batch-sequences", 4)
    return ["--model", model, "--data", corpus, "--output", output, *sizes]


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    folder = max((output / "checkpoints").glob("step-*"))
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(LORA, id="all", marks=pytest.mark.slow),
        pytest.param("rank=4,targets=attention+shared,dropout=0.3,rank_stabilised=true", id="dropout"),
        pytest.param(f"{LORA},base=fp8", id="fp8"),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, lora: str
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(*batch(pretrained, stdlib_corpus, straight), "--lora", lora, "--steps", 12)
    for steps in (6, 12):
        run(*batch(pretrained, stdlib_corpus, stopped), "--lora", lora, "--steps", steps)
    assert losses(stopped) == losses(straight)
    assert losses(straight)[-1] < losses(straight)[0] - 0.1
    ours, theirs = tensors_of(stopped), tensors_of(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(".adapter." in name for name in ours), "a checkpoint holds adapters alone"


@pytest.mark.parametrize("lora", [LORA, f"{LORA},base=fp8"], ids=["compute", "fp8"])
def test_random_weights_are_drawn_again_for_their_adapters(
    tmp_path: Path, model_folder: Path, stdlib_corpus: Path, lora: str
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = ("--lora", lora, "--initialize", "random", "--steps")
    run(*batch(model_folder, stdlib_corpus, straight), *options, 2)
    for steps in (1, 2):
        run(*batch(model_folder, stdlib_corpus, stopped), *options, steps)
    assert losses(stopped) == losses(straight)


@pytest.mark.parametrize("by_plan", [True, False], ids=["plan", "option"])
def test_adapters_are_not_trained_on_random_weights_unless_asked_for(
    tmp_path: Path, model_folder: Path, stdlib_corpus: Path, by_plan: bool, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*batch(model_folder, stdlib_corpus, tmp_path / "run"), "--lora", LORA]
    if by_plan:
        shape = dict(sequence_length=64, micro_batch_sequences=4, gradient_accumulation_steps=1)
        plan = one_device_plan(read_model_config(model_folder), **shape, compute_dtype="fp32", lora=parse_lora(LORA))
        save_plan(plan, tmp_path / "plan.json")
        arguments = [*arguments[:6], "--plan", tmp_path / "plan.json"]
    message = error_of(capsys, *arguments)
    assert f"run.model ({model_folder}) has no weights" in message
    assert "give a model with weights, or --initialize random" in message
    assert not (tmp_path / "run").exists()


def test_weights_in_fp8_are_near_those_of_the_folder_and_their_errors_are_told(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, in_fp8 = tmp_path / "whole", tmp_path / "in_fp8"
    run(*batch(pretrained, stdlib_corpus, whole), "--lora", LORA, "--steps", 1)
    capsys.readouterr()
    run(*batch(pretrained, stdlib_corpus, in_fp8), "--lora", f"{LORA},base=fp8", "--steps", 1)
    assert "frozen weights in fp8: they differ by attention.q_proj 2." in capsys.readouterr().err
    assert losses(in_fp8) != losses(whole)
    assert losses(in_fp8) == pytest.approx(losses(whole), rel=1e-2)
    errors = json.loads((in_fp8 / "run.json").read_text())["errors_in_fp8"]
    assert len(errors) == 10 and "feed_forward.experts.gate_up" in errors
    assert all(0.02 < error < 0.03 for error in errors.values())
    assert "errors_in_fp8" not in json.loads((whole / "run.json").read_text())


def test_a_checkpoint_on_weights_in_fp8_is_refused_on_whole_ones_and_the_other_way_round(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    spelt = {"": "rank=4,alpha=16,targets=all", ",base=fp8": "rank=4,alpha=16,targets=all,base=fp8"}
    for number, (then, now) in enumerate((("", ",base=fp8"), (",base=fp8", ""))):
        arguments = batch(pretrained, stdlib_corpus, tmp_path / str(number))
        run(*arguments, "--lora", LORA + then, "--steps", 1)
        capsys.readouterr()
        message = error_of(capsys, *arguments, "--lora", LORA + now, "--steps", 2)
        assert f"was written with adapters {spelt[then]}, this run has {spelt[now]}; use the same one" in message
        assert "weights: from" not in message, "before they are loaded"


def test_a_checkpoint_is_refused_on_other_weights_and_with_other_adapters(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    model = shutil.copytree(pretrained, tmp_path / "model")
    arguments = batch(model, stdlib_corpus, tmp_path / "run")
    run(*arguments, "--lora", LORA, "--steps", 1)
    message = error_of(capsys, *arguments, "--lora", "rank=4,alpha=8", "--steps", 2)
    assert "was written with adapters rank=4,alpha=16,targets=all, this run has rank=4,alpha=8,targets=all" in message
    message = error_of(capsys, *arguments, "--steps", 2)
    assert "was written with adapters rank=4,alpha=16,targets=all, this run has none" in message
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.experts.3.up_proj.weight"][5, 7] += 1e-4
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    message = error_of(capsys, *arguments, "--lora", LORA, "--steps", 2)
    assert "was written with frozen weights" in message and "use the same one, or another --output" in message


def test_a_run_of_all_weights_is_not_continued_with_adapters(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = batch(pretrained, stdlib_corpus, tmp_path / "run")
    run(*arguments, "--steps", 1)
    assert "was written with adapters none, this run has" in error_of(capsys, *arguments, "--lora", LORA, "--steps", 2)


def test_a_plan_decides_about_adapters(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    shape = dict(sequence_length=64, micro_batch_sequences=4, gradient_accumulation_steps=1)
    config = read_model_config(pretrained)
    for name, lora in (("adapters", parse_lora(LORA)), ("everything", None)):
        save_plan(one_device_plan(config, **shape, compute_dtype="fp32", lora=lora), tmp_path / f"{name}.json")
    where = ("--model", pretrained, "--data", stdlib_corpus)
    run(*where, "--plan", tmp_path / "adapters.json", "--output", tmp_path / "run", "--steps", 1)
    assert all(".adapter." in name for name in tensors_of(tmp_path / "run"))
    for name, given, planned in (
        ("adapters", "rank=8", "rank=4,alpha=16,targets=all"),
        ("everything", LORA, "all weights are trained"),
    ):
        plan = tmp_path / f"{name}.json"
        message = error_of(capsys, *where, "--plan", plan, "--output", tmp_path / "other", "--lora", given)
        assert f"run.lora ({given}) must be that of the plan {plan} ({planned})" in message


def test_adapters_can_stand_in_the_settings_file(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[run]\nlora = "{LORA}"\nsteps = 1\ntokens-per-step = 128\nmicro-batch-sequences = 2\n')
    where = ("--model", pretrained, "--data", stdlib_corpus, "--output", tmp_path / "run", "--device", "cpu")
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(settings), "run", *map(str, where)])
    assert not caught.value.code
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["plan"]["lora"]["rank"] == 4
    assert "lora.targets ('atention') must be one of" in error_of(
        capsys, *batch(pretrained, stdlib_corpus, tmp_path / "other"), "--lora", "rank=2,targets=atention"
    )


def export(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, arguments), "--json"])
    assert not caught.value.code


def export_error(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, arguments)])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pretrained: Path, stdlib_corpus: Path) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    run(*batch(pretrained, stdlib_corpus, output), "--lora", LORA, "--steps", 3)
    return output


def trained_factors(output: Path) -> dict[str, torch.Tensor]:
    prefix = "weights."
    return {name.removeprefix(prefix): t for name, t in tensors_of(output).items() if name.startswith(prefix)}


def test_a_merged_export_of_a_run_in_fp8_adds_to_the_weights_of_the_folder(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    run(*batch(pretrained, stdlib_corpus, output), "--lora", f"{LORA},base=fp8", "--steps", 2)
    export("--run", output, "--output", tmp_path / "merged", "--merge", "--dtype", "fp32")
    assert "are added to the weights as the folder has them" in capsys.readouterr().out
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", pretrained))
    factors = trained_factors(output)
    name, key = "layers.2.feed_forward.experts.adapter.", "model.layers.2.mlp.experts.5.down_proj.weight"
    delta = 4 * factors[f"{name}down_b"][5] @ factors[f"{name}down_a"][5]
    assert delta.any()
    torch.testing.assert_close(merged[key] - base[key], delta, rtol=1e-4, atol=1e-7)
    base["model.layers.2.self_attn.o_proj.weight"][3, 3] *= 1.5
    other = shutil.copytree(pretrained, tmp_path / "other")
    save_file(base, other / "model.safetensors", metadata={"format": "pt"})
    message = export_error(capsys, "--run", output, "--output", tmp_path / "m", "--merge", "--model", other)
    assert "was trained on those with" in message


def test_adapters_of_a_run_in_fp8_are_exported_and_continued(
    tmp_path: Path, pretrained: Path, stdlib_corpus: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(*batch(pretrained, stdlib_corpus, first), "--lora", f"{LORA},base=fp8", "--steps", 3)
    export("--run", first, "--output", tmp_path / "adapter", "--adapter", "peft")
    arguments = ("--adapter", tmp_path / "adapter", "--lora", f"{LORA},base=fp8", "--steps", 1)
    run(*batch(pretrained, stdlib_corpus, second), *arguments)
    assert losses(second)[0] < losses(first)[0] - 0.05, "it starts where the adapters ended"


def test_a_merged_export_is_the_weights_with_the_adapters_added(
    tmp_path: Path, finished: Path, pretrained: Path, capsys: pytest.CaptureFixture
) -> None:
    export("--run", finished, "--output", tmp_path / "merged", "--merge", "--dtype", "fp32")
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", pretrained))
    factors = trained_factors(finished)
    name = "layers.2.feed_forward.experts.adapter."
    for expert in range(factors[f"{name}down_a"].shape[0]):
        key = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        delta = 4 * factors[f"{name}down_b"][expert] @ factors[f"{name}down_a"][expert]
        torch.testing.assert_close(merged[key] - base[key], delta, rtol=1e-4, atol=1e-7)
        assert delta.any()
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    other = shutil.copytree(pretrained, tmp_path / "other")
    base["lm_head.weight"][3, 3] += 1e-3
    save_file(base, other / "model.safetensors", metadata={"format": "pt"})
    message = export_error(capsys, "--run", finished, "--output", tmp_path / "m", "--merge", "--model", other)
    assert "was trained on those with" in message and not (tmp_path / "m").exists()


@pytest.mark.parametrize("layout", ["peft", "per-expert"])
def test_exported_adapters_are_continued(
    tmp_path: Path, finished: Path, pretrained: Path, stdlib_corpus: Path, layout: str, capsys: pytest.CaptureFixture
) -> None:
    export("--run", finished, "--output", tmp_path / "adapter", "--adapter", layout)
    arguments = batch(pretrained, stdlib_corpus, tmp_path / "continued")
    run(*arguments, "--adapter", tmp_path / "adapter", "--steps", 1)
    assert losses(tmp_path / "continued")[0] < losses(finished)[0] - 0.05, "it starts where the adapters ended"
    message = error_of(
        capsys, *batch(pretrained, stdlib_corpus, tmp_path / "x"), "--adapter", tmp_path / "adapter", "--lora", "rank=8"
    )
    assert "has adapters of rank 4, run.lora (rank=8,alpha=16,targets=all) says 8" in message


def test_an_export_of_adapters_says_what_it_wants(
    tmp_path: Path,
    finished: Path,
    pretrained: Path,
    model_folder: Path,
    stdlib_corpus: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = ("--output", tmp_path / "out")
    assert "holds adapters; give --merge for a whole checkpoint" in export_error(capsys, "--run", finished, *out)
    message = export_error(capsys, "--run", finished, *out, "--merge", "--adapter", "peft")
    assert "export.merge and export.adapter (peft) exclude each other" in message
    whole, drawn = tmp_path / "whole", tmp_path / "drawn"
    run(*batch(pretrained, stdlib_corpus, whole), "--steps", 1)
    assert "holds whole weights and no adapters; drop --merge" in export_error(capsys, "--run", whole, *out, "--merge")
    run(*batch(model_folder, stdlib_corpus, drawn), "--lora", LORA, "--steps", 1, "--initialize", "random")
    message = export_error(capsys, "--run", drawn, *out, "--merge")
    assert "has no weights to merge with: the run started from random ones" in message
