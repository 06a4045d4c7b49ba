"""Splits that the names of files and folders tell: train, validation and test, in the spellings that are common."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}
_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?![^\W\d_])", re.IGNORECASE)
_SHARD = re.compile(r"(?P<split>\w+(?:[.-]\w+)*?)-\d{5}-of-\d{5}\b")


@dataclass(frozen=True, kw_only=True)
class NamedSplit:
    split: str
    place: str
    """The path down to the word that names the split, with that word left open: equal for the splits of one dataset."""


def split_of(name: str) -> NamedSplit | None:
    """Return the split that a file's path in its source names: by its outermost folder that does, else by the file."""
    parts = name.split("/")
    for number, part in enumerate(parts):
        found = _WORD.search(part)
        if found is None:
            continue
        split = _SPLIT_OF[found.group().lower()]
        shard = _SHARD.match(part) if number == len(parts) - 1 else None
        if shard is not None and found.end() <= shard.end("split"):
            split = shard["split"] if shard["split"].lower() not in _SPLIT_OF else split
        place = "/".join([*parts[:number], f"{part[: found.start()]}*{part[found.end() :]}"])
        return NamedSplit(split=split, place=place)
    return None
