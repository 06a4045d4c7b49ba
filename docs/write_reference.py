"""Writes the pages in docs/reference that are made from the code: `python docs/write_reference.py`.

Options are asked of the command line itself, exceptions are found in the sources, and decisions are listed by their
titles. `tests/test_docs_reference.py` fails where a page is not what this would write.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cyclopts.argument import Argument

from moescale.cli import _COMMANDS, _SIZES, app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTE = "<!-- made by docs/write_reference.py -->\n"
BASE = "MoescaleError"
PLACES = {"Path": "PATH", "str": "TEXT", "int": "INTEGER", "float": "NUMBER"}
SIGNALS = {
    130: "Interrupted by Ctrl-C without saving; of `run`, by a second Ctrl-C, or by one before the first step.",
    141: "What read the output has closed it, as `head` does.",
}
"""Exit statuses that no exception has: 128 and the number of a signal."""


def arguments(command: str) -> list[Argument]:
    """Return what a user may give a command, in the order of its help."""
    return [argument for argument in app[command].assemble_argument_collection(parse_docstring=True) if argument.show]


def is_positional(argument: Argument) -> bool:
    return argument.field_info.kind is inspect.Parameter.VAR_POSITIONAL


def alternatives(hint: Any) -> list[Any]:
    """Return the types that a value may have; None is not one that can be given."""
    union = get_origin(hint) in (Union, types.UnionType)
    return [part for part in get_args(hint) if part is not type(None)] if union else [hint]


def value(argument: Argument) -> str:
    """Return how a value is written: its choices, or the kind of thing it is. A switch has none."""
    (hint,) = alternatives(argument.hint)
    if get_origin(hint) is tuple:
        (hint, _) = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if hint is bool:
        return ""
    return "SIZE" if argument.name.removeprefix("--") in _SIZES else PLACES[hint.__name__]


def is_repeatable(argument: Argument) -> bool:
    return any(get_origin(part) is tuple for part in alternatives(argument.hint))


def default(argument: Argument) -> Any:
    """Return an option's default; ``inspect.Parameter.empty`` where it is required."""
    return argument.field_info.default


def description(argument: Argument) -> str:
    """Return the help of an option in one line; a type without a docstring of its own has none."""
    return " ".join((argument.parameter.help or "").split()).replace("|", r"\|")


def shown_default(argument: Argument) -> str:
    given = default(argument)
    if given is inspect.Parameter.empty:
        return "required" if argument.required else ""
    if given is None or given == ():
        return ""
    if isinstance(given, bool):
        return "on" if given else "off"
    return ", ".join(f"`{part}`" for part in given) if isinstance(given, tuple) else f"`{given}`"


def usage(command: str) -> str:
    """Return the shortest call: what is required, and that there is more."""
    parts = ["moescale", command]
    for argument in arguments(command):
        if is_positional(argument):
            parts.append(f"{argument.name}...")
        elif argument.required:
            parts.append(f"{argument.name} {value(argument)}")
    return " ".join([*parts, "[OPTIONS]"])


def commands_page() -> str:
    lines = ["# Commands", "", NOTE]
    lines += [
        "`moescale COMMAND --help` prints the same. `--config FILE` goes with any command and reads its table of a "
        "[settings file](settings.md), which the command line overrides. Paths that begin with `~` are in the home "
        "folder; others are relative to the working directory. A SIZE is a number with or without a unit (`64GB`, "
        "`64GiB`). An option that is on or off is turned on by its name and off by `--no-` before it; one that is "
        "repeatable is given once for each value.",
        "",
    ]
    for command, text in _COMMANDS.items():
        lines += [f"## {command}", "", text, "", "```text", usage(command), "```", ""]
        lines += ["| option | value | default | |", "|---|---|---|---|"]
        for argument in arguments(command):
            kind = value(argument).replace("|", r"\|") or "on or off"
            repeat = ", repeatable" if is_repeatable(argument) else ""
            lines.append(
                f"| `{argument.name}` | {kind}{repeat} | {shown_default(argument)} | {description(argument)} |"
            )
        lines.append("")
    return "\n".join(lines)


def toml_value(argument: Argument) -> str:
    """Return the default in TOML, or an example of the kind of value where there is none."""
    given = default(argument)
    if given is inspect.Parameter.empty or given is None:
        (hint,) = alternatives(argument.hint)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        given = (
            choices[0]
            if choices
            else {"Path": "PATH", "str": "TEXT", "int": 1, "float": 1.0, "bool": True}.get(
                getattr(hint, "__name__", ""), ("TEXT",)
            )
        )
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, tuple):
        return "[" + ", ".join(f'"{part}"' for part in given) + "]"
    return f'"{given}"' if isinstance(given, str) else str(given)


def settings_page() -> str:
    lines = ["# Settings file", "", NOTE]
    lines += [
        "`moescale COMMAND --config settings.toml` takes the options of the command from the table of its name. Keys "
        "are the options' names with `_` for `-`. A key or a table that nothing reads is an error, and the command "
        "line overrides the file. Keys without a value here are required or have no default; what they mean is in the "
        "list of [commands](commands.md).",
        "",
    ]
    for command in _COMMANDS:
        options = [argument for argument in arguments(command) if not is_positional(argument)]
        lines += [f"## [{command}]", "", "| key | value | default | |", "|---|---|---|---|"]
        for argument in options:
            key = argument.name.removeprefix("--").replace("-", "_")
            given = default(argument)
            none = given is inspect.Parameter.empty or given is None
            shown = ("required" if argument.required else "") if none else f"`{toml_value(argument)}`"
            kind = value(argument).replace("|", r"\|") or "true or false"
            kind = f"list of {kind}" if is_repeatable(argument) else kind
            lines.append(f"| `{key}` | {kind} | {shown} | {description(argument)} |")
        lines.append("")
    return "\n".join(lines)


@functools.cache
def exceptions() -> dict[str, tuple[int, str, str]]:
    """Return every exception for users: its exit status, its module, and the first line of its docstring.

    Found in the sources, so that nothing needs to be imported, and a new one is on the page without being listed.
    """
    classes: dict[str, tuple[list[str], int | None, str, str]] = {}
    for path in sorted((ROOT / "moescale").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                classes[node.name] = (bases, own_status(node), module, text)

    def status(name: str) -> int | None:
        bases, own, _, _ = classes.get(name, ([], None, "", ""))
        return own if own is not None else next(filter(None, map(status, bases)), None)

    def is_for_users(name: str) -> bool:
        return name == BASE or any(map(is_for_users, classes.get(name, ([],))[0]))

    found = {}
    for name, (_, _, module, text) in classes.items():
        code = status(name) if is_for_users(name) else None
        if code is not None:
            found[name] = (code, module, text)
    return found


def own_status(node: ast.ClassDef) -> int | None:
    for item in node.body:
        if isinstance(item, ast.Assign) and [ast.unparse(target) for target in item.targets] == ["exit_status"]:
            return ast.literal_eval(item.value)
    return None


def exit_status_page() -> str:
    """Return the page of exit statuses. Every status that an exception has must be explained here."""
    meanings = {
        0: "Done.",
        2: "Bad input: a setting, a file or a checkpoint. The message says which, its value, the rule, and what to do.",
        3: "The loss or weights are not finite. The last good checkpoint is untouched.",
        4: "A rank failed, left or no longer answers. The log of every rank names it.",
        75: "Stopped by SIGTERM or Ctrl-C, with the state saved: the same command resumes.",
    } | SIGNALS
    known = exceptions()
    by_status: dict[int, list[str]] = {}
    for name, (code, _, _) in known.items():
        by_status.setdefault(code, []).append(name)
    unexplained = sorted(set(by_status) - set(meanings))
    if unexplained:
        raise SystemExit(f"exit_status_page: say what exit status {unexplained} means")
    lines = ["# Exit status", "", NOTE, "| status | meaning | exceptions |", "|---|---|---|"]
    for code, meaning in meanings.items():
        names = ", ".join(f"`{name}`" for name in sorted(by_status.get(code, [])))
        lines.append(f"| {code} | {meaning} | {names} |")
    lines += [
        "",
        "## Exceptions",
        "",
        f"All derive from `moescale.errors.{BASE}`.",
        "",
        "| exception | module | |",
        "|---|---|---|",
    ]
    for name, (_, module, text) in sorted(known.items()):
        lines.append(f"| `{name}` | `{module}` | {text} |".replace("``", "`"))
    return "\n".join([*lines, ""])


def decisions_page() -> str:
    lines = ["# Decisions", "", NOTE, "Choices that someone would otherwise reverse, negative results included.", ""]
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join([*lines, ""])


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every generated page with its text."""
    yield DOCS / "reference" / "commands.md", commands_page()
    yield DOCS / "reference" / "settings.md", settings_page()
    yield DOCS / "reference" / "exit-status.md", exit_status_page()
    yield DOCS / "decisions" / "README.md", decisions_page()


def main() -> None:
    for path, text in pages():
        path.write_text(text)


if __name__ == "__main__":
    main()
