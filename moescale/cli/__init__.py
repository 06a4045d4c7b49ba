"""The command line. Each command has its own module, a thin caller of the package, which is imported on use."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict
from rich.console import Console

from moescale import __version__
from moescale.cli.missing import RequireOptions, usage_text
from moescale.environment import prefer_expandable_segments
from moescale.errors import ConfigError, MoescaleError, Preempted, nearest, printable
from moescale.files import remedy
from moescale.records import FileKind, read_toml
from moescale.records import show as show_value  # `show` is a module of this package, too
from moescale.user_values import parse_size

app = App(
    name="moescale",
    version=__version__,
    help="Compile, run and export parallel training of mixture-of-experts models (DeepSeek, GLM-4.7-Flash, Qwen3-MoE).",
    help_format="plaintext",  # rich's Markdown takes a third of the time of `moescale --help` to import
)
_COMMANDS = {
    "prepare": "Tokenise text and pack it into sequences.",
    "show": "Print sequences of a corpus, with the tokens that are learned in green, or {+marked so+} without colours.",
    "compile": "Plan parallel training for a cluster: will it fit, how fast, with which settings.",
    "run": "Train a model: start it, or continue the run in the output folder.",
    "doctor": "Examine this machine: what works, what does not, and how to fix it.",
    "calibrate": "Measure this machine and write a cluster file for compile.",
    "export": "Write a run's weights as a Hugging Face checkpoint.",
    "report": "Write a page about a run, or one that compares several.",
    "bench": "Measure the kernels next to their peers, or tune them; show the reference's table next to ours.",
}
_PATHS_OR_NAMES = frozenset({"model", "tokenizer", "source", "cluster"})
"""Options that accept a path or something else."""
_SIZES = {"memory-limit": "GiB", "memory-gigabytes": "GB", "max-shard-gigabytes": "GB"}
"""Options that are sizes, with the unit of a number without one."""
_SETTINGS = FileKind(
    noun="a settings file",
    missing="is not a file; give a TOML file with a table such as [run] as --config",
)
for _name, _help in _COMMANDS.items():
    app.command(f"moescale.cli.{_name}:{_name}_command", name=_name, help=_help, help_format="markdown")

app.register_install_completion_command(help="Write completion for this shell, and load it in the shell's start file.")


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> None:
    """Read settings from a TOML file, then run a command.

    Parameters
    ----------
    config
        TOML file with one table per command ([prepare], [compile], [run], [export]); the command line overrides it.
    """
    rules = (RequireOptions(tokens), *_RULES)
    if config is not None:
        document = read_toml(config.expanduser(), _SETTINGS)
        _check_tables(document, config)
        app.config = (Dict(document, source=str(config), use_commands_as_keys=True), *rules)
    else:
        app.config = rules
    app(tokens, exit_on_error=False, print_error=False)


def _check_tables(document: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for entries that no command reads; keys inside a table are checked by its command."""
    tables = ", ".join(f"[{name}]" for name in _COMMANDS)
    for name, value in document.items():
        if not isinstance(value, dict) and name in _COMMANDS:
            raise ConfigError(f"{path}: '{name}' ({show_value(value)}) must be a table, written [{name}]")
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path}: key '{name}' ({show_value(value)}) is outside the tables; put it under one of {tables}"
            )
        if name not in _COMMANDS:
            raise ConfigError(
                f"{path}: table [{name}] belongs to no command{nearest(name, _COMMANDS)}; the tables are {tables}"
            )


def _refuse_fractions(_app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise ConfigError for a fraction where an integer is required, which cyclopts would silently round."""
    for argument in arguments:
        if argument.hint is not int and int not in get_args(argument.hint):
            continue
        for token in argument.tokens:
            try:
                whole = float(token.value).is_integer()
            except ValueError:  # not a number at all: cyclopts says so
                continue
            if not whole:
                name = argument.name.removeprefix("--").replace("-", "_")
                origin = "" if token.source == "cli" else f"{token.source}: "
                raise ConfigError(f"{origin}{'.'.join((*commands, name))} ({token.value}) must be a whole number")


def _expand_home(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Expand ``~`` at the start of every path, on the command line and in settings files.

    Relative paths are relative to the working directory, also in settings files.
    """
    for argument in arguments:
        is_path = argument.hint is Path or Path in get_args(argument.hint)
        if is_path or argument.name.removeprefix("--") in _PATHS_OR_NAMES:
            argument.tokens[:] = [token.evolve(value=os.path.expanduser(token.value)) for token in argument.tokens]


def _read_sizes(_app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Convert sizes with a unit to numbers in the unit of the setting."""
    for argument in arguments:
        unit = _SIZES.get(argument.name.removeprefix("--"))
        if unit is None:
            continue
        for index, token in enumerate(argument.tokens):
            name = ".".join((*commands, argument.name.removeprefix("--").replace("-", "_")))
            setting = name if token.source == "cli" else f"{token.source}: {name}"
            try:
                float(token.value)
            except ValueError:
                size = parse_size(token.value, setting=setting, unit=unit)
                in_unit = size / parse_size("1", setting=setting, unit=unit)
                argument.tokens[index] = token.evolve(value=repr(in_unit))


def _refuse_names_of_weights(_app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise ConfigError for a path that is not UTF-8, where safetensors could not read or write weights."""
    if not set(commands) & {"run", "export"}:
        return
    for argument in arguments:
        for token in argument.tokens:
            if any("\udc80" <= character <= "\udcff" for character in token.value):
                name = argument.name.removeprefix("--").replace("-", "_")
                raise ConfigError(
                    f"{'.'.join((*commands, name))} ({token.value}) has a name that is not UTF-8, which safetensors "
                    "cannot open; rename it"
                )


_RULES = (_refuse_names_of_weights, _expand_home, _read_sizes, _refuse_fractions)
"""Rules applied to all values, from the command line and from settings files."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 2 bad input, 3 loss or weights not finite, 4 a rank failed, 75 stopped and
    resumable, 130 interrupted.
    """
    prefer_expandable_segments()  # before a command imports torch
    if arguments is not None:
        sys.argv[1:] = arguments  # with which a command on several ranks starts itself again
    try:
        app.meta(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:  # Printed here, not by the library, because it may quote a settings file.
        _print_error(usage_text(error))
        sys.exit(MoescaleError.exit_status)
    except Preempted as stop:  # As asked.
        _print(str(stop), "bold yellow")
        sys.exit(stop.exit_status)
    except MoescaleError as error:
        _print_error(str(error))
        sys.exit(error.exit_status)
    except BrokenPipeError:  # The reader of the output has closed it, as head does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # A full disk or missing permissions, which a traceback would not explain.
        path = "" if error.filename is None else f"{error.filename}: "
        advice = remedy(error)
        _print_error(f"{path}{error.strerror or error}{'' if advice is None else f'; {advice}'}")
        sys.exit(MoescaleError.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_error(text: str) -> None:
    _print(f"error: {text}", "bold red")


def _print(text: str, style: str) -> None:
    console = Console(stderr=True, markup=False, emoji=False)
    console.print(printable(text, keep="\n"), style=style, highlight=False, soft_wrap=True)
