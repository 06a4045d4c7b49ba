"""Patterns by which tokenizers split, spelt for Python's ``re`` so that both libraries mean the same by them.

Stages that each cut out runs of one class of characters can be merged with the stage after them: one expression with
the runs as alternatives, and without their characters in every other class, finds all pieces in one pass.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import NamedTuple

_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class UnsupportedPattern(Exception):
    """A construct whose meaning the two libraries might not share."""


_ELEMENT = re.compile(
    r"""(?P<category>\\(?P<sign>[pP])\{(?P<name>[A-Z][a-z]?)\})
    | (?P<space>\\s) | (?P<no_space>\\S)
    | (?P<escape>\\(?:[rntfv]|[^0-9A-Za-z\s]))
    | (?P<group>\(\?(?:[:!=]|i:)) | (?P<close>\))
    | (?P<open>\[\^?(?!\])) | (?P<close_class>\])
    | (?P<count>\{[0-9]+(?:,[0-9]*)?\}(?!\+)) | (?P<operator>[|*+?])
    | (?P<literal>[^\\()\[\]{}|*+?^$.\s]|[ ])""",
    re.VERBOSE,
)
_NOTHING = "(?:(?!))"
"""A class without characters."""
_CLASS_LITERAL = re.compile(r"[^\\\[\]&]|&(?!&)")


def translated(pattern: str, without: frozenset[int] = frozenset()) -> str:
    """Spell an Oniguruma pattern for Python's ``re``, so that both mean the same on stable characters.

    With ``without``, code points, the result matches none of them. Where they occur it behaves as at the end of a text.

    Raises:
        UnsupportedPattern: the pattern has an element outside the small language of tokenizers' patterns, or one
            matches characters of ``without`` by name.
    """
    result: list[str] = []
    atoms: list[str] = []
    class_begin: int | None = None
    position = 0
    while position < len(pattern):
        in_class = class_begin is not None
        literal = _CLASS_LITERAL.match(pattern, position) if in_class else None
        element = literal or _ELEMENT.match(pattern, position)
        if element is None:
            raise UnsupportedPattern(pattern[position:])
        position = element.end()
        kind = "literal" if literal else str(element.lastgroup)
        if kind in ("sign", "name", "category", "space", "no_space"):
            is_space = kind in ("space", "no_space")
            negated = kind == "no_space" or element["sign"] == "P"
            if in_class and negated:
                raise UnsupportedPattern(element.group())
            codes = _spaces() if is_space else _category(element["name"])
            members = ranges(codes | without if negated else codes - without)
            result.append(members if in_class else _class_of(members, negated))
            atoms += [] if in_class else result[-1:]
            continue
        allowed = literal or kind in ("escape", "close_class") if in_class else kind != "close_class"
        if not allowed:
            raise UnsupportedPattern(element.group())
        if kind == "close_class" and class_begin is not None:
            content = "".join(result[class_begin:])
            content += ranges(without) if content.startswith("[^") else ""
            result[class_begin:] = [_NOTHING if content == "[" else f"{content}]"]
            class_begin = None
            atoms += result[-1:]
            continue
        if kind == "open":
            class_begin = len(result)
        elif kind in ("escape", "literal") and not in_class:
            atoms.append(element.group())
        result.append(element.group())
    return _checked("".join(result), atoms, without)


def _class_of(members: str, negated: bool) -> str:
    if not members:
        return _NOTHING
    return f"[{'^' * negated}{members}]"


def _checked(expression: str, atoms: list[str], without: frozenset[int]) -> str:
    try:
        matches_nothing = re.compile(expression).match("")
        excluded = "".join(map(chr, without))
        matches_excluded = any(re.search(atom, excluded, re.IGNORECASE) for atom in atoms) if excluded else False
    except re.error as error:
        raise UnsupportedPattern(expression) from error
    if matches_nothing or matches_excluded:
        raise UnsupportedPattern(expression)
    return expression


_RUNS = re.compile(r"(?P<characters>\[(?:[^\\\]]|\\.)+\])(?:\+|\{1,[0-9]*\})?")


class MergedStages(NamedTuple):
    expression: str
    """Matches in one pass the pieces that the stages find one after the other."""
    num_stages: int
    run_characters: frozenset[int]
    """Code points of the runs. Later stages, in their turn, would cut these pieces further: they are still to be put
    through them, each by itself."""


def merged(patterns: list[str]) -> MergedStages:
    """Merge the leading stages that cut out runs with the first one after them.

    Raises:
        UnsupportedPattern: the first stage is outside the language of :func:`translated`.
    """
    alternatives: list[str] = []
    taken: frozenset[int] = frozenset()
    runs_of_last: frozenset[int] = frozenset()
    for pattern in patterns:
        try:
            alternatives.append(translated(pattern, taken | runs_of_last))
        except UnsupportedPattern:
            if not alternatives:
                raise
            break
        taken |= runs_of_last
        runs = _RUNS.fullmatch(alternatives[-1])
        if runs is None:
            break
        find = re.compile(runs["characters"]).fullmatch
        runs_of_last = frozenset(code for code in stable_characters() if find(chr(code)))
    expression = "|".join(f"(?:{alternative})" for alternative in alternatives)
    return MergedStages(expression, len(alternatives), taken)


@cache
def _spaces() -> frozenset[int]:
    find = re.compile(f"[{_SPACES}]").fullmatch
    return frozenset(code for code in stable_characters() if find(chr(code)))


@cache
def stable_characters() -> frozenset[int]:
    """Code points of the basic plane whose category is the one they had in Unicode 3.2."""
    return frozenset(
        code
        for code in range(0x10000)
        if (category := unicodedata.category(chr(code))) == unicodedata.ucd_3_2_0.category(chr(code))
        and category not in ("Cn", "Co", "Cs")
    )


@cache
def _category(name: str) -> frozenset[int]:
    """Stable code points of a category ("Lu") or group of categories ("L")."""
    return frozenset(code for code in stable_characters() if unicodedata.category(chr(code)).startswith(name))


def ranges(codes: frozenset[int]) -> str:
    """Spell a set of code points as the inside of a character class."""
    runs: Iterator[list[int]] = (
        [code for _, code in run] for _, run in groupby(enumerate(sorted(codes)), lambda pair: pair[1] - pair[0])
    )
    return "".join(f"\\u{run[0]:04x}-\\u{run[-1]:04x}" for run in runs)
