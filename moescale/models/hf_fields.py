"""Checks of single fields of a Hugging Face config.json, for every family. Imports no torch."""

from __future__ import annotations

import math
from typing import Any


def wrong_integer(value: Any) -> str | None:
    """Return what is wrong with an integer field's value, or None."""
    if not isinstance(value, int) or isinstance(value, bool):
        return f"must be an integer, not {json_type(value)}"
    return None


def wrong_number(value: Any) -> str | None:
    """Return what is wrong with a number field's value, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"must be a number, not {json_type(value)}"
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        finite = False
    return None if finite else "must be finite"


def json_type(value: Any) -> str:
    """Return the name of a value's type in JSON, with its article."""
    names = {str: "a text", bool: "a truth value", int: "an integer", float: "a number with a fraction"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
