"""docs/architecture.md: the picture is what the code says, and no imports go in a circle."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_layers.py"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_layers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imports(drawing):
    return drawing.read_imports()


def test_the_picture_is_that_of_the_code(drawing, imports):
    page = drawing.PAGE.read_text()
    drawn = drawing.with_picture(page, drawing.draw(drawing.read_layers(), imports))
    assert page == drawn, "run `python docs/draw_layers.py`"


def test_contributors_are_told_the_layers_that_are_enforced(drawing):
    (told,) = re.findall(r"^```\n(cli -> .*?)```", (SCRIPT.parents[1] / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert [row.strip(" {}").split(", ") for row in " ".join(told.split()).split("->")] == drawing.read_layers()


FILES = re.compile(r"`([\w/{},]+\.py)`")


def test_files_that_a_change_is_said_to_touch_are_there(drawing):
    package = SCRIPT.parents[1] / "moescale"
    missing = []
    for line in drawing.PAGE.read_text().splitlines():
        for pattern in FILES.findall(line) if line.startswith("| ") else ():
            before, brace, rest = pattern.partition("{")
            names, _, after = rest.partition("}")
            for name in names.split(",") if brace else [""]:
                path = f"{before}{name}{after}"
                found = (package / path).is_file() or any(package.rglob(path))
                missing += [] if found else [path]
    assert missing == []


def test_no_module_imports_another_in_a_circle(drawing, imports):
    assert drawing.find_circle(imports) == []


def test_a_circle_is_found(drawing, imports):
    (name,) = (module for module in imports["moescale.plan"] if module == "moescale.formats")
    assert set(drawing.find_circle(imports | {name: {"moescale.plan"}})) >= {"moescale.plan", name}


def test_every_part_of_the_package_is_in_a_layer(drawing, imports):
    parts = {part for row in drawing.read_layers() for part in row}
    assert {module.split(".")[1] for module in imports if "." in module} - parts == {"__main__"}


def test_arrows_that_follow_from_others_are_left_out(drawing):
    imports = {"moescale.a": {"moescale.b.x", "moescale.c"}, "moescale.b.x": {"moescale.c"}, "moescale.c": set()}
    assert drawing.arrows([["a"], ["b"], ["c"]], imports) == [("a", "b"), ("b", "c")]
