"""How a broken rule becomes an error: the kind of the file, the path of the field, and the value as errors show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moescale.errors import ConfigError, MoescaleError


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What the files of one kind have in common: how errors speak of them, and how large they may be."""

    noun: str
    """With its article: "a plan"."""
    error: type[MoescaleError] = ConfigError
    remedy: str = ""
    """What to do about a damaged file."""
    missing: str = "missing"
    """What to say of a file that is not there."""
    root: str = ""
    """Prefix of every field in errors."""
    max_bytes: int = 2**26
    whole_floats: bool = False
    """Take a float without a fraction, such as 80e9, for an integer."""
    ignores_unknown: bool = False
    """Ignore fields that no annotation names: the format is another program's."""


class Problem(Exception):
    """A rule that a field breaks; the fields around it and the file are added on the way out."""

    def __init__(self, field: str, text: str, remedy: str | None = None) -> None:
        super().__init__(field, text)
        self.field, self.text, self.remedy = field, text, remedy

    def inside(self, field: str) -> Problem:
        return Problem(join(field, self.field), self.text, self.remedy)

    def __str__(self) -> str:
        return f"{self.field}{self.text}" if self.text.startswith(":") else f"{self.field} {self.text}".strip()


class errors_of:
    """Turns a problem into the kind's error, with the file and the remedy."""

    def __init__(self, origin: str, kind: FileKind) -> None:
        self.origin, self.kind = origin, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, problem: BaseException | None, _traceback: object) -> None:
        if isinstance(problem, Problem):
            text = str(problem) if self.origin in ("", self.kind.root) else f"{self.origin}: {problem}"
            raise self.kind.error(with_remedy(text, self.kind) if problem.remedy is None else text) from None


def with_remedy(text: str, kind: FileKind) -> str:
    """An error's text and what to do about a file of this kind."""
    return f"{text}; {kind.remedy}" if kind.remedy else text


def join(outer: str, inner: str) -> str:
    """The path of the field ``inner`` of the field ``outer``."""
    return f"{outer}.{inner}" if outer and inner and not inner.startswith("[") else outer + inner


def key_of(key: object) -> str:
    """A key as paths of fields have it."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 200 else show(key)


def show(value: Any) -> str:
    """A value as errors show it: short, on one line, without anything a terminal would act on."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 512:  # Python refuses to write the longest
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
