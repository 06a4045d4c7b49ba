"""Links between the files of the repository lead somewhere, headings included. Needs no tool that builds the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in (".", "docs", "benchmarks", "examples")
    for path in ((ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
)
CODE = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the ids that headings of a page get."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub(_inside, page.read_text()), re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", slug) for slug in slugs}


def _inside(code: re.Match[str]) -> str:
    """Code of a line stays in headings without its marks; blocks of code hold none."""
    return "" if code[1] else code[0].strip("`")


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        # A folder is no page: a link to it works in some places and not in others.
        if not target.is_file() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_a_dead_link_is_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# A `name` here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#a-name-here) [b](absent.md) [c](there.md#elsewhere) [d](.) `[e](code.md)` [f](https://x.y/z)\n"
    )
    assert dead_links(page) == ["absent.md", "there.md#elsewhere", "."]


def test_menu_of_the_site_names_pages_that_are_there():
    menu = re.findall(r"^(\S+\.md)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert len(menu) > 10 and [page for page in menu if not (ROOT / "docs" / page).is_file()] == []
