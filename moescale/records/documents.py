"""From a file to a document: bounded bytes, UTF-8 text, and JSON or TOML of bounded depth with finite numbers."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescale.records.problems import FileKind, Problem, errors_of, join, key_of, show, with_remedy

MAX_DEPTH = 32
"""Objects and lists in one another; far beyond any of the package's files, far below Python's own limit."""
MAX_NAME_CHARACTERS = 1000
"""Of a key; the longest names of tensors have 100."""
MAX_DIGITS = 400
"""Beyond the largest float's 309."""
_UNUSUAL = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]|[0-9]{18}|[eE]\+?[0-9]{3}")
"""What a document must hold to have a number or a text that needs a closer look."""


@dataclass(frozen=True)
class LongNumber:
    """Stands for an integer with more digits than anything needs, until it is refused under its field's name."""

    num_digits: int

    def __repr__(self) -> str:
        return f"a number of {self.num_digits} digits"


def read_json(path: Path, kind: FileKind) -> Any:
    """Return the document in a JSON file. Raises the kind's error."""
    return parse_json(read_bytes(path, kind), str(path), kind)


def read_json_object(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the object in a JSON file. Raises the kind's error, also where it holds anything else."""
    return _object(read_json(path, kind), str(path), kind)


def read_toml(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the document in a TOML file. Raises the kind's error."""
    return parse_toml(read_bytes(path, kind), str(path), kind)


def parse_json(content: bytes | str, origin: str, kind: FileKind) -> Any:
    """Return the document that a JSON text holds; ``origin`` names the text in errors. Raises the kind's error."""
    with errors_of(origin, kind):
        text = _decode(content)
        try:
            document = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_parse_integer)
        except RecursionError:
            raise Problem("", f"has more than {MAX_DEPTH} objects and lists in one another") from None
        except ValueError as error:
            raise Problem("", f"is not JSON ({error})") from None
        check_depth(document, kind.root)
        if _UNUSUAL.search(text.encode()):
            check_values(document, kind.root)
        return document


def parse_json_object(content: bytes | str, origin: str, kind: FileKind) -> dict[str, Any]:
    """Return the object that a JSON text holds. Raises the kind's error, also where it holds anything else."""
    return _object(parse_json(content, origin, kind), origin, kind)


def parse_toml(content: bytes | str, origin: str, kind: FileKind) -> dict[str, Any]:
    """Return the document that a TOML text holds; ``origin`` names the text in errors. Raises the kind's error."""
    with errors_of(origin, kind):
        try:
            document = tomllib.loads(_decode(content))
        except RecursionError:
            raise Problem("", f"has more than {MAX_DEPTH} tables and arrays in one another") from None
        except ValueError as error:  # TOMLDecodeError, and Python's own of numbers and dates
            raise Problem("", f"is not TOML ({error})") from None
        check_depth(document, kind.root)
        check_values(document, kind.root)
        return document


def read_json_lines(path: Path, kind: FileKind) -> Iterator[Any]:
    """Yield the document in each line of a JSON Lines file. Raises the kind's error, naming the line."""
    for number, line in enumerate(read_bytes(path, kind).split(b"\n"), start=1):
        if line.strip():
            yield parse_json(line, f"{path}:{number}", kind)


def read_bytes(path: Path, kind: FileKind) -> bytes:
    """Return what is in a regular file of at most ``kind.max_bytes``. Raises the kind's error."""
    try:
        # A pipe without a writer would keep the open waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise kind.error(f"{path}: is not a regular file")
            content = stream.read(kind.max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise kind.error(f"{path}: {kind.missing}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise kind.error(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > kind.max_bytes:
        raise kind.error(with_remedy(f"{path}: has more than {kind.max_bytes:,} bytes, too many for {kind.noun}", kind))
    return content


def check_depth(document: Any, root: str) -> None:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [item for node in level for item in _children(node) if isinstance(item, dict | list)]
        if not level:
            return
    raise Problem(root, f"has more than {MAX_DEPTH} objects and lists in one another")


def check_values(value: Any, field: str) -> None:
    """Refuse what no writer of these files writes: numbers that are not finite, texts that are not Unicode."""
    if isinstance(value, dict):
        _check_names(value, field)
        for key, item in value.items():
            if not key.isascii():
                check_text(key, field)
            if not _is_ordinary(item):
                check_values(item, join(field, key_of(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if not _is_ordinary(item):
                check_values(item, f"{field}[{index}]")
    elif isinstance(value, str):
        check_text(value, field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Problem(field, f"({value}) must be a finite number")
    elif isinstance(value, LongNumber) or (isinstance(value, int) and abs(value) > sys.float_info.max):
        raise Problem(field, f"({show(value)}) must be a finite number of usual size")


def _is_ordinary(value: Any) -> bool:
    """Whether a value is one of the many that need no closer look, nor the path of their field."""
    return (type(value) is str and value.isascii()) or (type(value) is int and -(2**63) <= value < 2**63)


def check_text(text: Any, field: str) -> None:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode(errors="surrogateescape")  # a file name that is not UTF-8 is spelled by U+DC80 to U+DCFF
        except UnicodeEncodeError:
            raise Problem(field, f"({show(text)}) must be text: it has half of a surrogate pair") from None


def _object(document: Any, origin: str, kind: FileKind) -> dict[str, Any]:
    with errors_of(origin, kind):
        if not isinstance(document, dict):
            raise Problem(kind.root, f"must be a JSON object, not {type(document).__name__}")
    return document


def _decode(content: bytes | str) -> str:
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(
            "", f"is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8", remedy=""
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Problem("", f"has the key {show(double)} twice in one object")
    _check_names(found, "")
    return found


def _check_names(found: Mapping[str, Any], field: str) -> None:
    if found and max(map(len, found)) > MAX_NAME_CHARACTERS:
        longest = max(found, key=len)
        raise Problem(
            field, f"has a key of {len(longest)} characters ({show(longest)}), more than {MAX_NAME_CHARACTERS}"
        )


def _parse_integer(digits: str) -> Any:
    return int(digits) if len(digits) <= MAX_DIGITS else LongNumber(len(digits.lstrip("-")))


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
