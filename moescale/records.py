"""Strict reader of every JSON and TOML file: what comes from a file is checked before it is believed. Imports no torch.

A file is read in three steps, each of which ends in an error that names the file, the field and the rule:

1. its bytes: a regular file of bounded size that holds UTF-8 text, with or without a byte order mark;
2. its document: JSON or TOML without duplicate keys, of bounded depth, whose numbers are finite;
3. its record: a frozen dataclass, whose annotations are the rules. ``int`` means 64 bits, ``float`` finite; further
   rules stand in ``Annotated``: :class:`Range`, :class:`Matches`, :class:`Length`, :data:`FileName`.

No other module of the package parses JSON or TOML from a file; a test holds them to that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import stat
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from moescale.errors import ConfigError, MoescaleError, nearest

MAX_DEPTH = 32
"""Objects and lists in one another; far beyond any of the package's files, far below Python's own limit."""
MAX_NAME_CHARACTERS = 1000
"""Of a key; the longest names of tensors have 100."""
MAX_DIGITS = 400
"""Beyond the largest float's 309."""
_UNUSUAL = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]|[0-9]{18}|[eE]\+?[0-9]{3}")
"""What a document must hold to have a number or a text that needs a closer look."""

Record = TypeVar("Record")


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


class _Problem(Exception):
    """A rule that a field breaks; the fields around it and the file are added on the way out."""

    def __init__(self, field: str, text: str, remedy: str | None = None) -> None:
        super().__init__(field, text)
        self.field, self.text, self.remedy = field, text, remedy

    def inside(self, field: str) -> _Problem:
        return _Problem(_join(field, self.field), self.text, self.remedy)

    def __str__(self) -> str:
        return f"{self.field}{self.text}" if self.text.startswith(":") else f"{self.field} {self.text}".strip()


@dataclass(frozen=True)
class _LongNumber:
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
    with _errors_of(origin, kind):
        text = _decode(content)
        try:
            document = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_parse_integer)
        except RecursionError:
            raise _Problem("", f"has more than {MAX_DEPTH} objects and lists in one another") from None
        except ValueError as error:
            raise _Problem("", f"is not JSON ({error})") from None
        _check_depth(document, kind.root)
        if _UNUSUAL.search(text.encode()):
            _check_values(document, kind.root)
        return document


def parse_json_object(content: bytes | str, origin: str, kind: FileKind) -> dict[str, Any]:
    """Return the object that a JSON text holds. Raises the kind's error, also where it holds anything else."""
    return _object(parse_json(content, origin, kind), origin, kind)


def parse_toml(content: bytes | str, origin: str, kind: FileKind) -> dict[str, Any]:
    """Return the document that a TOML text holds; ``origin`` names the text in errors. Raises the kind's error."""
    with _errors_of(origin, kind):
        try:
            document = tomllib.loads(_decode(content))
        except RecursionError:
            raise _Problem("", f"has more than {MAX_DEPTH} tables and arrays in one another") from None
        except ValueError as error:  # TOMLDecodeError, and Python's own of numbers and dates
            raise _Problem("", f"is not TOML ({error})") from None
        _check_depth(document, kind.root)
        _check_values(document, kind.root)
        return document


def read_json_lines(path: Path, kind: FileKind) -> Iterator[Any]:
    """Yield the document in each line of a JSON Lines file. Raises the kind's error, naming the line."""
    for number, line in enumerate(read_bytes(path, kind).split(b"\n"), start=1):
        if line.strip():
            yield parse_json(line, f"{path}:{number}", kind)


def build(record: type[Record], document: Any, origin: str, kind: FileKind) -> Record:
    """Return the dataclass ``record`` with the values of a document, each checked by its field's annotation.

    Raises the kind's error for an unknown field (with the nearest known one), a missing one, or a value that breaks its
    rule, the record's own ``__post_init__`` included.
    """
    with _errors_of(origin, kind):
        try:
            return typing.cast(Record, _check_of(typing.cast(Any, record))(document, kind))
        except MoescaleError as error:  # of __post_init__
            raise _Problem("", str(error), remedy="" if ";" in str(error) else None) from error
        except _Problem as problem:
            raise problem.inside(kind.root) from None


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
        raise kind.error(
            _with_remedy(f"{path}: has more than {kind.max_bytes:,} bytes, too many for {kind.noun}", kind)
        )
    return content


def show(value: Any) -> str:
    """A value as errors show it: short, on one line, without anything a terminal would act on."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 512:  # Python refuses to write the longest
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def file_name_problem(name: str) -> str | None:
    """The rule that ``name`` breaks as a plain file name, or None."""
    return PathRule().problem(name)


class _errors_of:
    """Turns a problem into the kind's error, with the file and the remedy."""

    def __init__(self, origin: str, kind: FileKind) -> None:
        self.origin, self.kind = origin, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, problem: BaseException | None, _traceback: object) -> None:
        if isinstance(problem, _Problem):
            text = str(problem) if self.origin in ("", self.kind.root) else f"{self.origin}: {problem}"
            raise self.kind.error(_with_remedy(text, self.kind) if problem.remedy is None else text) from None


def _with_remedy(text: str, kind: FileKind) -> str:
    return f"{text}; {kind.remedy}" if kind.remedy else text


def _object(document: Any, origin: str, kind: FileKind) -> dict[str, Any]:
    with _errors_of(origin, kind):
        if not isinstance(document, dict):
            raise _Problem(kind.root, f"must be a JSON object, not {type(document).__name__}")
    return document


def _decode(content: bytes | str) -> str:
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Problem(
            "", f"is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8", remedy=""
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Problem("", f"has the key {show(double)} twice in one object")
    _check_names(found, "")
    return found


def _check_names(found: Mapping[str, Any], field: str) -> None:
    if found and max(map(len, found)) > MAX_NAME_CHARACTERS:
        longest = max(found, key=len)
        raise _Problem(
            field, f"has a key of {len(longest)} characters ({show(longest)}), more than {MAX_NAME_CHARACTERS}"
        )


def _parse_integer(digits: str) -> Any:
    return int(digits) if len(digits) <= MAX_DIGITS else _LongNumber(len(digits.lstrip("-")))


def _check_depth(document: Any, root: str) -> None:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [item for node in level for item in _children(node) if isinstance(item, dict | list)]
        if not level:
            return
    raise _Problem(root, f"has more than {MAX_DEPTH} objects and lists in one another")


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _check_values(value: Any, field: str) -> None:
    """Refuse what no writer of these files writes: numbers that are not finite, texts that are not Unicode."""
    if isinstance(value, dict):
        _check_names(value, field)
        for key, item in value.items():
            _check_text(key, field)
            _check_values(item, _join(field, _key(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_values(item, f"{field}[{index}]")
    elif isinstance(value, str):
        _check_text(value, field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _Problem(field, f"({value}) must be a finite number")
    elif isinstance(value, _LongNumber) or (isinstance(value, int) and abs(value) > sys.float_info.max):
        raise _Problem(field, f"({show(value)}) must be a finite number of usual size")


def _check_text(text: Any, field: str) -> None:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode(errors="surrogateescape")  # a file name that is not UTF-8 is spelled by U+DC80 to U+DCFF
        except UnicodeEncodeError:
            raise _Problem(field, f"({show(text)}) must be text: it has half of a surrogate pair") from None


def _key(key: object) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 200 else show(key)


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner and not inner.startswith("[") else outer + inner


Check = Callable[[Any, FileKind], Any]
"""Returns the value that a field gets, or raises a problem whose path begins at the value."""


@functools.cache
def _check_of(hint: Any) -> Check:
    """The check of an annotation, made once: a checkpoint's state has millions of values."""
    if dataclasses.is_dataclass(hint):
        return _dataclass_check(typing.cast(type, hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _rules_check(_check_of(arguments[0]), arguments[1:])
    if origin is Literal:
        return _literal_check(arguments)
    if origin in (typing.Union, types.UnionType):
        return _union_check(arguments)
    if origin in (tuple, list):
        return _sequence_check(origin, arguments)
    if origin in (dict, Mapping):
        return _mapping_check(*arguments)
    if hint is Any or hint is object:
        return _free
    return functools.partial(_scalar, hint if origin is None else origin)


def _dataclass_check(record: Any) -> Check:
    hints = typing.get_type_hints(record, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(record) if f.init}
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    checks = {name: _check_of(hints[name]) for name in fields}

    def check(value: Any, kind: FileKind) -> Any:
        if not isinstance(value, dict):
            raise _Problem("", f"must be an object, not {type(value).__name__}")
        if not value.keys() <= checks.keys() and not kind.ignores_unknown:
            key = next(key for key in value if key not in checks)
            raise _Problem(_key(key), f"is not a field of {kind.noun}{nearest(key, fields)}", remedy="")
        for name in required:
            if name not in value:
                raise _Problem(name, "is missing")
        values = {}
        for name, check_field in checks.items():
            if name in value:
                try:
                    values[name] = check_field(value[name], kind)
                except _Problem as problem:
                    raise problem.inside(name) from None
        return record(**values)

    return check


def _rules_check(check_value: Check, rules: tuple[Any, ...]) -> Check:
    def check(value: Any, kind: FileKind) -> Any:
        built = check_value(value, kind)
        for rule in rules:
            problem = rule.problem(built)
            if problem is not None:
                raise _Problem("", f"({show(value)}) {problem}")
        return built

    return check


def _literal_check(choices: tuple[Any, ...]) -> Check:
    def check(value: Any, kind: FileKind) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise _Problem("", f"({show(value)}) must be one of {', '.join(map(str, choices))}")
        return value

    return check


def _union_check(members: tuple[Any, ...]) -> Check:
    """Only the member that a value means is checked, so that an error tells of that one alone."""
    others = [member for member in members if member is not type(None)]
    lists = [member for member in others if typing.get_origin(member) in (tuple, list)]
    first, of_lists = _check_of(others[0]), _check_of((lists or others)[0])

    def check(value: Any, kind: FileKind) -> Any:
        if value is None and type(None) in members:
            return None
        return of_lists(value, kind) if isinstance(value, list) else first(value, kind)

    return check


def _sequence_check(sequence: Any, arguments: tuple[Any, ...]) -> Check:
    checks = [_check_of(argument) for argument in arguments if argument is not Ellipsis]
    is_fixed = sequence is tuple and arguments[-1] is not Ellipsis

    def check(value: Any, kind: FileKind) -> Any:
        if not isinstance(value, list):
            return _scalar(sequence, value, kind)
        if is_fixed and len(value) != len(checks):
            raise _Problem("", f"must have {len(checks)} elements, not {len(value)}")
        built: list[Any] = []
        try:
            for check_item, item in zip(checks if is_fixed else itertools.repeat(checks[0]), value, strict=False):
                built.append(check_item(item, kind))
        except _Problem as problem:
            raise problem.inside(f"[{len(built)}]") from None
        return sequence(built)

    return check


def _mapping_check(name_hint: Any, item_hint: Any) -> Check:
    check_name, check_item = _check_of(name_hint), _check_of(item_hint)

    def check(value: Any, kind: FileKind) -> Any:
        if not isinstance(value, dict):
            return _scalar(dict, value, kind)
        built = {}
        for key, item in value.items():
            try:
                check_name(key, kind)
            except _Problem as problem:
                raise _Problem("", f": the name {problem}") from None
            try:
                built[key] = check_item(item, kind)
            except _Problem as problem:
                raise problem.inside(_key(key)) from None
        return built

    return check


def _free(value: Any, kind: FileKind) -> Any:
    _check_depth(value, "")
    _check_values(value, "")
    return value


def _scalar(wanted: Any, value: Any, kind: FileKind) -> Any:
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        _check_values(value, "")
        return float(value)
    if wanted is int and kind.whole_floats and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not wanted and (not isinstance(value, wanted) or isinstance(value, bool)):
        if isinstance(value, _LongNumber):
            _check_values(value, "")
        raise _Problem("", f"({show(value)}) must be of type {wanted.__name__}")
    if wanted is int and not -(2**63) <= value < 2**63:
        _check_values(value, "")
        raise _Problem("", f"({show(value)}) must be a 64-bit integer")
    if wanted is str:
        _check_text(value, "")
    return value
