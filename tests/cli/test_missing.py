"""A command without what it needs says all of it, with an example that the command accepts."""

from __future__ import annotations

import shlex

import pytest

from moescale.cli import app, main
from moescale.cli.missing import EXAMPLES


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("prepare", "--source, --tokenizer, --sequence-length and --output"),
        ("show", "--data"),
        ("compile", "--model"),
        ("run", "--model, --data and --output"),
        ("calibrate", "--output"),
        ("export", "--run and --output"),
        ("report", "the folder of a run"),
    ],
)
def test_a_command_without_options_names_all_that_it_needs_with_an_example(command, needed, capsys):
    error = error_of(capsys, command)
    assert error.startswith(f"error: {command} needs {needed}")
    assert f"for example `moescale {EXAMPLES[command]}`; `moescale {command} --help`" in error


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_give_all_that_a_command_needs_and_nothing_it_does_not_know(command, capsys):
    _, bound, _ = app.parse_args(shlex.split(EXAMPLES[command]), exit_on_error=False, print_error=False)
    assert bound.args or bound.kwargs


def test_what_a_settings_file_or_the_command_line_gives_is_not_asked_for(tmp_path, capsys):
    path = tmp_path / "settings.toml"
    path.write_text('[run]\nmodel = "tiny"\n')
    assert "error: run needs --output; " in error_of(capsys, "run", "--config", str(path), "--data", "corpus")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--modle", "tiny"], "compile needs --model (--modle is not an option); for example"),
        (["compile", "--model"], "compile: --model needs a value after it; for example"),
        (["run", "--model", "--data", "corpus"], "run: --model needs a value after it; for example"),
        (["compile", "--model", "tiny", "stray"], "compile: 'stray' belongs to no option; for example"),
        (["compile", "--model", "tiny", "--sequence-lenth", "5"], "Did you mean --sequence-length?"),
    ],
)
def test_slips_on_the_command_line_are_named(arguments, message, capsys):
    assert message in error_of(capsys, *arguments)
