"""What is printed is what it says: square brackets, colons and escapes in names are not acted on."""

from __future__ import annotations

import ast
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
