"""What every result of a benchmark begins with: how it was made, from which code, when, on what. Imports no torch."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton")
"""Whose versions count wherever they take part."""


def describe_measurement(*packages: str) -> dict[str, Any]:
    """Return the command, commit, date, machine and versions of the measurement that this process makes.

    Args:
        packages: distributions whose versions decide the result, beyond Python's and those of PACKAGES in use.
    """
    return {
        "command": command_of(sys.argv),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        **_gpus(),
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` as JSON for readers and for version control."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def command_of(arguments: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Return the command that started a script, as one would type it in the repository.

    Of paths outside the working directory the last part is kept: where a machine keeps its files is its own affair.
    """
    environment = dict(os.environ) if environment is None else environment
    words = [_short(word) for word in arguments]
    if Path(arguments[0]).name in ("moescale", "__main__.py"):
        return shlex.join(["moescale", *words[1:]])
    ranks = environment.get("WORLD_SIZE") if "RANK" in environment else None
    launcher = ["python"] if ranks is None else ["torchrun", "--nproc-per-node", ranks]
    return shlex.join([*launcher, *words])


def _short(word: str) -> str:
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    try:
        value = str(path.relative_to(Path.cwd()))
    except ValueError:
        value = path.name
    return f"{option}{equals}{value}"


def _commit() -> str | None:
    """The commit checked out, with ``+changes`` where tracked files differ from it; None outside a repository."""
    folder = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
    if head.returncode:
        return None
    changes = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, cwd=folder
    )
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _gpus() -> dict[str, str]:
    """The machine's GPUs, by its driver: torch would take memory on one to answer."""
    try:
        names = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    counts = collections.Counter(names)
    return {"gpu": ", ".join(name if number == 1 else f"{number} x {name}" for name, number in counts.items())}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    wanted = dict.fromkeys([*(name for name in PACKAGES if name in sys.modules), *packages])
    versions = {}
    for name in wanted:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if "torch" in versions:
        versions["torch"] = sys.modules["torch"].__version__ if "torch" in sys.modules else versions["torch"]
    return versions
