"""Rules of fields, for ``Annotated``: each says what is wrong with a value, or None."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Rule of a number: ``least <= value <= most``, and ``above < value``."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def problem(self, value: Any) -> str | None:
        if self.least is not None and value < self.least:
            return f"must be at least {self.least}"
        if self.above is not None and value <= self.above:
            return "must be positive" if self.above == 0 else f"must be above {self.above}"
        if self.most is not None and value > self.most:
            return f"must be at most {self.most}"
        return None


@dataclass(frozen=True)
class Length:
    """Rule of a text, list or object: its number of characters or elements."""

    least: int = 0
    most: int = sys.maxsize

    def problem(self, value: Any) -> str | None:
        if len(value) < self.least:
            return "must not be empty" if self.least == 1 else f"must have at least {self.least} elements"
        return f"must have at most {self.most} elements" if len(value) > self.most else None


@dataclass(frozen=True)
class Matches:
    """Rule of a text: a regular expression that it matches as a whole."""

    pattern: str
    meaning: str

    def problem(self, value: Any) -> str | None:
        return None if re.fullmatch(self.pattern, value) else f"must be {self.meaning}"


@dataclass(frozen=True)
class PathRule:
    """Rule of a text: a path inside the folder of its file, without folders unless ``has_folders``."""

    has_folders: bool = False

    def problem(self, value: Any) -> str | None:
        parts = value.split("/")
        plain = all(part not in ("", ".", "..") and len(os.fsencode(part)) <= 255 for part in parts)
        if not plain or "\\" in value or not value.isprintable() or (len(parts) > 1 and not self.has_folders):
            kind = "a path below the file's folder" if self.has_folders else "a plain file name"
            return f"must be {kind}, without '..'"
        return None


FileName = Annotated[str, PathRule()]
RelativePath = Annotated[str, PathRule(has_folders=True)]
Count = Annotated[int, Range(least=0)]
Positive = Annotated[int, Range(least=1)]
Sha256 = Annotated[str, Matches("[0-9a-f]{64}", "a SHA-256: 64 hexadecimal digits")]


def file_name_problem(name: str) -> str | None:
    """The rule that ``name`` breaks as a plain file name, or None."""
    return PathRule().problem(name)
