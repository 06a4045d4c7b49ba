"""What is printed is what it says: square brackets, colons and escapes in names are not acted on."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

import moescale
from moescale import cli

SOURCES = sorted(Path(moescale.__file__).parent.rglob("*.py"))


def test_every_console_takes_text_as_it_is():
    found = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                off = {word.arg for word in node.keywords if getattr(word.value, "value", None) is False}
                assert {"markup", "emoji"} <= off, f"{path}:{node.lineno}"
                found += 1
    assert found >= 5


@pytest.mark.parametrize("name", ["run[lr=3e-4,bs=1]", "runs[/x]", "a:smile:b"])
def test_a_folder_with_brackets_or_colons_is_shown_as_it_is(tmp_path, model_folder, stdlib_corpus, capsys, name):
    paths = ["--model", str(model_folder), "--data", str(stdlib_corpus), "--output", str(tmp_path / name)]
    for steps in ("1", "2"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["run", *paths, "--steps", steps, "--device", "cpu"])
        assert not caught.value.code
    errors = capsys.readouterr().err
    assert f"checkpoint {tmp_path / name}/checkpoints/step-00000001" in errors
    assert f"resumed from {tmp_path / name}/checkpoints/step-00000001" in errors


def test_what_is_printed_goes_through_say_or_a_console():
    """The latter print text by ``printable`` themselves, or nothing that comes from a user."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert path.name == "errors.py", f"{path}:{node.lineno}: prints by itself"


ODD = "odd\x1b[31m\x07\u202e"


def test_no_command_acts_on_a_name_or_prints_one_as_it_is(tmp_path, model_folder, stdlib_corpus, capsys):
    model = shutil.copytree(model_folder, tmp_path / ODD / "model")
    run, plan, corpus = tmp_path / ODD / "run", tmp_path / f"{ODD}.json", tmp_path / f"corpus {ODD}"
    source = tmp_path / f"{ODD}.txt"
    source.write_text("some words of a text, again " * 50)
    commands = (
        ("prepare", "--source", source, "--tokenizer", model, "--sequence-length", 16, "--output", corpus),
        ("compile", "--model", model, "--sequence-length", 64, "--tokens-per-step", 64, "--output", plan),
        ("run", "--model", model, "--data", stdlib_corpus, "--output", run, "--steps", 1, "--device", "cpu"),
        ("run", "--model", model, "--data", stdlib_corpus, "--output", run, "--steps", 2, "--device", "cpu"),
        ("export", "--run", run, "--output", tmp_path / f"export {ODD}"),
        ("report", run),
        ("run", "--model", f"{ODD}/none", "--data", stdlib_corpus, "--output", run),
    )
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, command)))
        assert caught.value.code in ((2,) if f"{ODD}/none" in command else (0, None))
        printed = "".join(capsys.readouterr())
        assert not set(ODD) & set(printed) - set("odd[31m"), command
        assert r"odd\x1b[31m\x07\u202e" in printed, command


def test_weights_below_a_name_that_is_not_utf8_are_refused_before_the_work(tmp_path, stdlib_corpus, capsys):
    name = os.fsdecode(b"caf\xe9")
    for command in (
        ("run", "--model", "tiny", "--data", stdlib_corpus, "--output", tmp_path / name),
        ("export", "--run", tmp_path / name, "--output", tmp_path / "out"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, command)))
        assert caught.value.code == 2
        assert r"caf\xe9) has a name that is not UTF-8, which safetensors" in capsys.readouterr().err
