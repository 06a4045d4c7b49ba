"""Commands in the documentation: their options exist, and what a CPU can run does what the page says.

A block marked ``bash`` is run by bash in an empty folder that a page's blocks share. Every line of a ``text`` block
right after it, but ``...``, must be in what it printed. ``console`` has both: what follows ``$`` is run, may fail, and
must print the lines below it. ``python file=NAME`` is saved as NAME. Others are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "text", "sh")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match["info"], match["body"]) for match in BLOCK.finditer(page.read_text())]


def commands(page: Path) -> list[list[str]]:
    """Return the words of every call of moescale in a page's blocks."""
    found = []
    for info, body in blocks(page):
        for line in body.replace("\\\n", " ").splitlines() if info in SHELL else ():
            call = re.search(r"(?:^|\s)(?:-m )?moescale ([a-z]+ .*)", line)
            if call and not line.startswith(("error", "usage")):
                found.append(shlex.split(call[1], comments=True))
    return found


@pytest.fixture(scope="module")
def known_options() -> dict[str, set[str]]:
    names = [name for name in app if not name.startswith("-")]
    return {
        name: {option for argument in app[name].assemble_argument_collection() for option in argument.names}
        for name in names
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_pages_exist(page, known_options):
    unknown = []
    for command, *words in commands(page):
        given = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--config", "--help"}
        unknown += [f"{command} {option}" for option in given - known_options.get(command, set())]
        unknown += [command] if command not in known_options else []
    assert unknown == []


def follow(page: Path, folder: Path) -> int:
    """Run a page's blocks; return how many."""
    (folder / "bin").mkdir()
    for name, words in (("moescale", f"{sys.executable} -m moescale"), ("python", sys.executable)):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    work = folder / "work"
    work.mkdir()
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
    }

    def shell(command: str) -> tuple[int, str]:
        """Run a command; return its status and what it printed, errors last."""
        done = subprocess.run(
            ["bash", "-euc", command], cwd=work, env=environment, capture_output=True, text=True, timeout=500
        )
        return done.returncode, done.stdout + done.stderr

    output, run = None, 0
    for info, body in blocks(page):
        if info.startswith("python file="):
            (work / info.removeprefix("python file=")).write_text(body)
        elif info == "bash":
            status, output = shell(body)
            assert status == 0, f"{body}\n{output}"
            run += 1
            continue
        elif info == "console":
            for command, _, expected in (call.partition("\n") for call in re.split(r"^\$ ", body, flags=re.M)[1:]):
                check_output(expected, shell(command)[1])
                run += 1
        elif info == "text" and output is not None:
            check_output(body, output)
        output = None
    return run


def check_output(expected: str, printed: str) -> None:
    lines = {line.rstrip() for line in printed.splitlines()}
    missing = [line for line in expected.splitlines() if line.strip() not in ("", "...") and line not in lines]
    assert missing == [], f"what this prints has changed; paste it again:\n{printed}"


FOLLOWED = [path for path in PAGES if re.search("^```(bash|console)$", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(path, marks=[] if path.parent == ROOT else pytest.mark.slow, id=str(path.relative_to(ROOT)))
        for path in FOLLOWED
    ],
)
def test_a_page_followed_word_for_word_works(page, tmp_path):
    assert follow(page, tmp_path) > 0


def test_a_page_that_is_wrong_is_noticed(tmp_path, known_options):
    page = tmp_path / "page.md"
    page.write_text(
        "```\nmoescale run --learning-rat 1\n```\n\n```bash\necho one\necho two\n```\n\n```text\none\n...\n```\n"
    )
    with pytest.raises(AssertionError):
        test_commands_and_options_in_pages_exist(page, known_options)
    assert follow(page, tmp_path) == 1
    page.write_text(page.read_text().replace("\none\n...", "\nthree\n"))
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError, match="paste it again"):
        follow(page, tmp_path / "again")
