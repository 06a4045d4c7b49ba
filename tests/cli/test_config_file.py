"""--config: a TOML file with one table per command, and every way it can be wrong."""

from pathlib import Path

import pytest

from moescale.cli import main


def errors_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Standard error of a command that ends with status 2, on one line."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    errors = capsys.readouterr().err
    assert caught.value.code == 2, errors
    return " ".join(errors.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[runn]\nsteps = 5", "table [runn] belongs to no command; did you mean 'run'?"),
        ("steps = 5\n[run]\nseed = 1", "key 'steps' (5) is outside the tables; put it under one of [prepare]"),
        ("run = 5", "'run' (5) must be a table, written [run]"),
        ("[[run]]\nsteps = 5", "'run' (a list) must be a table, written [run]"),
        ("[run", "is not TOML"),
    ],
)
def test_what_no_command_would_read_is_refused(text: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    errors = errors_of(capsys, "export", "--config", path, "--run", tmp_path, "--output", tmp_path / "out")
    assert f"{path}: {message}" in errors


@pytest.mark.parametrize("setting", ["steps = 1.5", "warmup_steps = 1.9", "warmup-steps = '1.9'", "seed = nan"])
def test_a_fraction_where_a_whole_number_is_asked_for_is_refused_instead_of_rounded(
    setting: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f"[run]\n{setting}\n")
    name, value = setting.replace("-", "_").replace("'", "").split(" = ")
    given = ["--model", "tiny", "--data", tmp_path, "--output", tmp_path / "run"]
    rule = "must be a finite number" if value == "nan" else "must be a whole number"
    assert f"{path}: run.{name} ({value}) {rule}" in errors_of(capsys, "run", "--config", path, *given)
    option = f"--{name.replace('_', '-')}={value}"
    assert f"error: run.{name} ({value}) must be a whole number" in errors_of(capsys, "run", option, *given)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300"])
def test_an_endless_or_empty_wait_for_a_hang_is_refused(value: str, tmp_path: Path, capsys) -> None:
    given = ["--model", "tiny", "--data", tmp_path, "--output", tmp_path / "run"]
    errors = errors_of(capsys, "run", f"--hang-seconds={value}", *given)
    assert "run.hang_seconds (" in errors and "must be between 1 and 86400" in errors


def test_whole_numbers_and_fractions_where_they_belong_are_read(tmp_path: Path, capsys) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("[run]\nsteps = 5\nlearning_rate = 1.5e-4\nkeep_checkpoints = 0\n")
    given = ["--model", "tiny", "--data", tmp_path, "--output", tmp_path / "run"]
    errors = errors_of(capsys, "run", "--config", path, *given)
    assert "run.keep_checkpoints (0) must be at least 1" in errors


@pytest.mark.parametrize("line", ['"a\\u001b[31mX" = 1', 'sequence_length = "a\\u001b[31mX"', 'pin = "a\\u001b[31mX"'])
def test_what_a_settings_file_holds_is_printed_without_what_a_terminal_acts_on(line: str, tmp_path, capsys) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f"[compile]\n{line}\n")
    errors = errors_of(capsys, "compile", "--model", "tiny", "--config", path)
    assert errors.startswith("error: ") and "\x1b" not in errors and r"a\x1b[31mX" in errors
