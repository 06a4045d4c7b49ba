"""Error messages for missing options: all required options that were not given, and a complete example command."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cyclopts import App, ArgumentCollection, CycloptsError, MissingArgumentError, UnusedCliTokensError

from moescale.errors import ConfigError

EXAMPLES = {
    "prepare": "prepare --source my-text/ --tokenizer deepseek-ai/DeepSeek-Coder-V2-Lite-Base --sequence-length 2048 "
    "--output data",
    "show": "show data --first 1",
    "compile": "compile --model deepseek-coder-v2-lite --cluster h100-sxm --plan-gpus 2 --output plan.json",
    "run": "run --model deepseek-ai/DeepSeek-Coder-V2-Lite-Base --plan plan.json --data data --output runs/first",
    "calibrate": "calibrate --output my-cluster.toml",
    "export": "export --run runs/first --output my-model",
    "report": "report runs/first",
}
"""An example of each command that has required options."""


def advice(command: str) -> str:
    """Return an example of ``command`` and a pointer to its options."""
    example = f"for example `moescale {EXAMPLES[command]}`; " if command in EXAMPLES else ""
    return f"{example}`moescale {command} --help` lists all options"


class RequireOptions:
    """A rule for cyclopts: raises an error with all required options missing from command line and settings file."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._options = [token.partition("=")[0] for token in tokens if token.startswith("--")]

    def __call__(self, _app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        missing = [one.name for one in arguments if one.required and not one.children and not one.tokens]
        if not missing or not commands:
            return
        known = {name for argument in arguments for name in argument.names}
        mistyped = [option for option in self._options if option not in known]
        needed = []
        for name in missing:
            near = difflib.get_close_matches(name, mistyped, n=1, cutoff=0.6)
            needed.append(f"{name} ({near[0]} is not an option)" if near else name)
        last = f" and {needed[-1]}" if len(needed) > 1 else needed[-1]
        raise ConfigError(f"{' '.join(commands)} needs {', '.join(needed[:-1])}{last}; {advice(commands[0])}")


def usage_text(error: CycloptsError) -> str:
    """Return the error text of a command line, if the library's own text has no remedy."""
    command = " ".join(error.command_chain or ())
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{command}: {error.keyword or error.argument.name} needs a value after it; {advice(command)}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens and not command.startswith("-"):
        return f"{command}: '{error.unused_tokens[0]}' belongs to no option; {advice(command)}"
    return str(error)
