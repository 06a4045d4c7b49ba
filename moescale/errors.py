"""Errors meant for the user: what was read, its value, the rule it breaks, and what to do.

Every error a user can cause derives from :class:`MoescaleError`; the command line prints its message without a
traceback and leaves with :data:`MoescaleError.exit_status`. ``assert`` is for invariants of the code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TextIO


class MoescaleError(Exception):
    """Base of all user-facing errors."""

    exit_status = 2


class ConfigError(MoescaleError):
    """A setting, model configuration or plan has a value that breaks a rule."""


class DataError(MoescaleError):
    """A corpus or its source cannot be used as it is."""


class CheckpointError(MoescaleError):
    """A checkpoint or Hugging Face folder is missing, incomplete, damaged or does not match the model."""


class NonFiniteLossError(MoescaleError):
    """The loss became NaN or infinite; nothing was saved over the last good checkpoint."""

    exit_status = 3


class NonFiniteWeightsError(CheckpointError):
    """Weights that are to be trained hold NaN or infinity."""

    exit_status = 3


class Preempted(MoescaleError):
    """The run was asked to stop (SIGTERM, Ctrl-C); its state was saved and it can be resumed."""

    exit_status = 75


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string.

    The first known name that continues ``name`` after a hyphen counts as the closest: ``h100-sxm`` for ``h100``. Upper
    and lower case do not matter.
    """
    by_lower: dict[str, str] = {}
    for other in known:
        by_lower.setdefault(other.lower(), other)
    name = name.lower()
    continuations = [other for other in by_lower if name and other.startswith(f"{name}-")]
    matches = continuations or difflib.get_close_matches(name, by_lower, n=1, cutoff=cutoff)
    return f"; did you mean '{by_lower[matches[0]]}'?" if matches else ""


def printable(text: str, keep: str = "") -> str:
    """Return ``text`` with what a terminal would act on, and what no encoding has, spelt as escapes.

    Names of files and contents of records may hold anything: terminal escapes, line breaks, bytes that are not UTF-8.
    Characters of ``keep`` stay as they are.
    """
    return "".join(
        character if character in keep or character.isprintable() else _escape(character) for character in text
    )


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines for a user to ``file``, standard output by default, as :func:`printable` spells them.

    Whatever the package prints goes through here or a console that does the same; a test holds it to that.
    """
    print(printable(text, keep="\n"), file=file, flush=True)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
