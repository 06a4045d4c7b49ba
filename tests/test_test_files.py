"""The test files themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_every_test_file_has_a_name_of_its_own():
    """Their folders are no packages, so two of one name cannot be collected in one process."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [name for name, number in names.items() if number > 1]
