"""Files of the package that are not Python are part of an installation: pyproject.toml names each."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moescale"


def test_every_data_file_is_named_and_every_name_finds_files():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["moescale"]
    found = {pattern: set(PACKAGE.glob(pattern)) for pattern in patterns}
    assert [pattern for pattern, paths in found.items() if not paths] == []
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data - set().union(*found.values()) == set()
