"""Draws the picture of the layers in docs/architecture.md from the code: `python docs/draw_layers.py`.

The rows are the layers that pyproject.toml enforces, the arrows imports between them. An arrow is left out where a
longer way of arrows leads to the same place.
"""

from __future__ import annotations

import graphlib
import itertools
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- picture: docs/draw_layers.py -->\n", "<!-- end of the picture -->\n"


def read_layers() -> list[list[str]]:
    """Return the enforced layers from the top down, each the names of its parts of the package."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix("moescale.") for name in row.split("|")] for row in contract["layers"]]


def read_imports() -> dict[str, set[str]]:
    """Return which modules each module of the package imports, those that it imports in functions included."""
    graph = grimp.build_graph("moescale", exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, the first one again at its end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def arrows(layers: list[list[str]], imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return imports between parts of the package without those that follow from others."""
    parts = [part for row in layers for part in row]
    uses: dict[str, set[str]] = {part: set() for part in parts}
    for module, imported in imports.items():
        for other in imported:
            pair = [name.split(".")[1] for name in (module, other) if name.count(".")]
            if len(pair) == 2 and pair[0] != pair[1] and set(pair) <= set(parts):
                uses[pair[0]].add(pair[1])
    reached: dict[str, set[str]] = {}
    for part in reversed(parts):  # what a part imports is below it
        reached[part] = uses[part].union(*(reached.get(other, set()) for other in uses[part]))
    return [
        (part, other)
        for part in parts
        for other in parts
        if other in uses[part] and not any(other in reached[between] for between in uses[part] - {other})
    ]


def draw(layers: list[list[str]], imports: dict[str, set[str]]) -> str:
    """Return the picture as Mermaid."""
    lines = ["```mermaid", "flowchart TB"]
    for number, row in enumerate(layers):
        lines += [f'  subgraph layer{number} [" "]', "    direction LR", *(f"    {part}" for part in row), "  end"]
    lines += [f"  {part} --> {other}" for part, other in arrows(layers, imports)]
    return "\n".join([*lines, "```"]) + "\n"


def with_picture(page: str, picture: str) -> str:
    """Return ``page`` with ``picture`` between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return "".join(itertools.chain((before, BEGIN, picture, END, after)))


def main() -> None:
    """Write the picture into the page."""
    PAGE.write_text(with_picture(PAGE.read_text(), draw(read_layers(), read_imports())))


if __name__ == "__main__":
    main()
