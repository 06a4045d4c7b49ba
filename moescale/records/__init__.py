"""Strict reader of every JSON and TOML file: what comes from a file is checked before it is believed. Imports no torch.

A file is read in three steps, each of which ends in an error that names the file, the field and the rule:

1. its bytes: a regular file of bounded size that holds UTF-8 text, with or without a byte order mark;
2. its document: JSON or TOML without duplicate keys, of bounded depth, whose numbers are finite;
3. its record: a frozen dataclass, whose annotations are the rules. ``int`` means 64 bits, ``float`` finite; further
   rules stand in ``Annotated``: :class:`Range`, :class:`Matches`, :class:`Length`, :data:`FileName`.

``documents`` takes the first two steps, ``annotations`` the third; ``rules`` has the rules, ``problems`` makes the
errors. No other module of the package parses JSON or TOML from a file; a test holds them to that.
"""

from moescale.records.annotations import build
from moescale.records.documents import (
    MAX_DEPTH,
    parse_json,
    parse_json_object,
    parse_toml,
    read_bytes,
    read_json,
    read_json_lines,
    read_json_object,
    read_toml,
)
from moescale.records.problems import FileKind, show
from moescale.records.rules import (
    Count,
    FileName,
    Length,
    Matches,
    PathRule,
    Positive,
    Range,
    RelativePath,
    Sha256,
    file_name_problem,
)

__all__ = [
    "Count",
    "FileKind",
    "FileName",
    "Length",
    "MAX_DEPTH",
    "Matches",
    "PathRule",
    "Positive",
    "Range",
    "RelativePath",
    "Sha256",
    "build",
    "file_name_problem",
    "parse_json",
    "parse_json_object",
    "parse_toml",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "read_json_object",
    "read_toml",
    "show",
]
