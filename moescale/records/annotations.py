"""From a document to a record: a dataclass each of whose values keeps the rules of its field's annotation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from moescale.errors import MoescaleError, nearest
from moescale.records.documents import LongNumber, check_depth, check_text, check_values
from moescale.records.problems import FileKind, Problem, errors_of, key_of, show

Record = TypeVar("Record")


def build(record: type[Record], document: Any, origin: str, kind: FileKind) -> Record:
    """Return the dataclass ``record`` with the values of a document, each checked by its field's annotation.

    Raises the kind's error for an unknown field (with the nearest known one), a missing one, or a value that breaks its
    rule, the record's own ``__post_init__`` included.
    """
    with errors_of(origin, kind):
        try:
            return typing.cast(Record, _check_of(typing.cast(Any, record))(document, kind))
        except MoescaleError as error:  # of __post_init__
            raise Problem("", str(error), remedy="" if ";" in str(error) else None) from error
        except Problem as problem:
            raise problem.inside(kind.root) from None


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
            raise Problem("", f"must be an object, not {type(value).__name__}")
        if not value.keys() <= checks.keys() and not kind.ignores_unknown:
            key = next(key for key in value if key not in checks)
            raise Problem(key_of(key), f"is not a field of {kind.noun}{nearest(key, fields)}", remedy="")
        for name in required:
            if name not in value:
                raise Problem(name, "is missing")
        values = {}
        for name, check_field in checks.items():
            if name in value:
                try:
                    values[name] = check_field(value[name], kind)
                except Problem as problem:
                    raise problem.inside(name) from None
        return record(**values)

    return check


def _rules_check(check_value: Check, rules: tuple[Any, ...]) -> Check:
    def check(value: Any, kind: FileKind) -> Any:
        built = check_value(value, kind)
        for rule in rules:
            problem = rule.problem(built)
            if problem is not None:
                raise Problem("", f"({show(value)}) {problem}")
        return built

    return check


def _literal_check(choices: tuple[Any, ...]) -> Check:
    def check(value: Any, kind: FileKind) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise Problem("", f"({show(value)}) must be one of {', '.join(map(str, choices))}")
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
            raise Problem("", f"must have {len(checks)} elements, not {len(value)}")
        built: list[Any] = []
        try:
            for check_item, item in zip(checks if is_fixed else itertools.repeat(checks[0]), value, strict=False):
                built.append(check_item(item, kind))
        except Problem as problem:
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
            except Problem as problem:
                raise Problem("", f": the name {problem}") from None
            try:
                built[key] = check_item(item, kind)
            except Problem as problem:
                raise problem.inside(key_of(key)) from None
        return built

    return check


def _free(value: Any, kind: FileKind) -> Any:
    check_depth(value, "")
    check_values(value, "")
    return value


def _scalar(wanted: Any, value: Any, kind: FileKind) -> Any:
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        check_values(value, "")
        return float(value)
    if wanted is int and kind.whole_floats and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not wanted and (not isinstance(value, wanted) or isinstance(value, bool)):
        if isinstance(value, LongNumber):
            check_values(value, "")
        raise Problem("", f"({show(value)}) must be of type {wanted.__name__}")
    if wanted is int and not -(2**63) <= value < 2**63:
        check_values(value, "")
        raise Problem("", f"({show(value)}) must be a 64-bit integer")
    if wanted is str:
        check_text(value, "")
    return value
