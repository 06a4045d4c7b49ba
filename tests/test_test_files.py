"""The test files themselves: where they are, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "moescale"
OWN_FOLDERS = {"damage", "distributed", "parity"}
"""Of tests that go through several modules; every other folder is named after the package's own."""
FOLDERS = sorted({path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")})


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_of_tests_is_a_package_so_that_names_may_repeat(folder):
    assert (TESTS / folder / "__init__.py").is_file()


@pytest.mark.parametrize(
    "folder", [folder for folder in FOLDERS if folder.parts[:1] not in {(n,) for n in OWN_FOLDERS}]
)
def test_a_folder_of_tests_is_named_after_one_of_the_package(folder):
    assert (PACKAGE / folder).is_dir()


def modules_tested_elsewhere() -> list[str]:
    """Modules that have a test file of their name, which is not in the folder of theirs, though its name is unique."""
    paths = list(PACKAGE.rglob("*.py"))
    stems = [path.stem for path in paths]
    own = {path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    wrong = []
    for path in paths:
        if path.stem == "__init__" or stems.count(path.stem) > 1:
            continue
        mirrored = path.relative_to(PACKAGE).with_name(f"test_{path.name}")
        named = [test for test in own if test.name == mirrored.name and test.parts[0] not in OWN_FOLDERS]
        if named and mirrored not in named:
            wrong.append(f"{named[0]} tests {path.relative_to(PACKAGE)}")
    return wrong


def test_the_test_of_a_module_is_where_the_module_is():
    assert modules_tested_elsewhere() == []
