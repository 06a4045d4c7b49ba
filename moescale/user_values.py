"""Values as users write them, in options and settings files alike: sizes with units. Imports no torch."""

from __future__ import annotations

import math
import re

from moescale.errors import ConfigError

_UNITS = {"": 1.0, "b": 1.0} | {
    f"{prefix}{infix}b": base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for infix, base in (("", 1000.0), ("i", 1024.0))
}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str, *, setting: str, unit: str) -> float:
    """Return the bytes that a size means: a number of ``unit``, or one with a unit of its own (64GB, 64GiB, 1.5 TB).

    Raises ConfigError naming ``setting`` and the text.
    """
    match = _SIZE.fullmatch(text)
    suffix = match[2].lower() if match else ""
    if match is None or suffix not in _UNITS or not math.isfinite(float(match[1]) * _UNITS[suffix or unit.lower()]):
        raise ConfigError(
            f"{setting} ({text}) must be a finite number of {unit}, or a size with a unit such as 64GB, 64GiB or 1.5TB"
        )
    return float(match[1]) * _UNITS[suffix or unit.lower()]
