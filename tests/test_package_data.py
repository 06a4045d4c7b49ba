"""Files of the package that are not Python are part of an installation: pyproject.toml names each."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moescale"


def test_every_data_file_is_named_and_every_name_finds_files():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["moescale"]
    found = {pattern: set(PACKAGE.glob(pattern)) for pattern in patterns}
    assert [pattern for pattern, paths in found.items() if not paths] == []
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data - set().union(*found.values()) == set()


def test_the_lock_file_of_a_gpu_machine_has_an_allowed_version_of_everything_it_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-gpu.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = [project["optional-dependencies"][extra] for extra in ("cute", "hub", "report")]
    required = [Requirement(text) for text in (*project["dependencies"], *sum(extras, []))]
    assert len(required) > 12
    for requirement in required:
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version, prereleases=True), requirement
