"""Every option that is a number: zero and less are taken, or refused by name with what to give instead."""

from __future__ import annotations

from typing import get_args

import pytest

from moescale.cli import app, main

REQUIRED = {
    "prepare": ("--source=none", "--tokenizer=none", "--sequence-length=64", "--output=none"),
    "compile": ("--model=tiny", "--sequence-length=64", "--tokens-per-step=64"),
    "run": ("--model=tiny", "--data=none", "--output=none"),
    "export": ("--run=none", "--output=none"),
}


def is_number(hint: object) -> bool:
    return bool({int, float} & {hint, *get_args(hint)})


OPTIONS = [
    (command, argument.name)
    for command in REQUIRED
    for argument in app[command].assemble_argument_collection()
    if is_number(argument.hint)
]


def test_there_are_such_options():
    assert {("run", "--steps"), ("prepare", "--num-workers"), ("compile", "--memory-limit")} <= set(OPTIONS)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_number_that_is_not_positive_is_taken_or_refused_with_a_remedy(
    command, option, value, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    others = [given for given in REQUIRED[command] if not given.startswith(f"{option}=")]
    try:
        main([command, f"{option}={value}", *others])
    except SystemExit as stopped:
        assert stopped.code in (0, 2)
    error = capsys.readouterr().err
    name = f"{command}.{option.removeprefix('--').replace('-', '_')} ({value}"
    if name in error:
        rule, _, remedy = error.partition("; ")
        assert "must " in rule and len(remedy) > 5, error
    elif command == "compile":
        assert error == ""
    else:  # taken: what comes next is that none of the paths is there
        assert "none" in error
