"""docs/reference: generated pages are what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "docs" / "write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(writer):
    stale = [str(path) for path, text in writer.pages() if not path.is_file() or path.read_text() != text]
    assert stale == [], "run `python docs/write_reference.py`"


def test_every_option_is_described(writer):
    missing = [
        f"{command} {argument.name}"
        for command in writer._COMMANDS
        for argument in writer.arguments(command)
        if not writer.description(argument)
    ]
    assert missing == []


def test_exceptions_found_in_the_sources_are_those_of_the_package(writer):
    from moescale.errors import NonFiniteWeightsError, Preempted
    from moescale.runtime.watchdog import RankFailure

    found = writer.exceptions()
    for error in (NonFiniteWeightsError, Preempted, RankFailure):  # inherited, own, and of another module
        assert found[error.__name__][:2] == (error.exit_status, error.__module__)
    assert all(text for _, _, text in found.values())


def test_api_page_names_every_public_name():
    import moescale

    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    objects = re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.MULTILINE)
    assert [name for name in moescale.__all__ if f"{moescale._MODULES[name]}.{name}" not in objects] == []


def test_the_picture_is_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("plot_speed", ROOT / "benchmarks" / "plot_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PICTURE.read_text() == module.draw(), "run `python benchmarks/plot_speed.py`"
