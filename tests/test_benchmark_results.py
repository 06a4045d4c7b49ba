"""Every result of a benchmark says how it was made, and the table in benchmarks/README.md leads to it."""

from __future__ import annotations

import datetime
import importlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.cli import _COMMANDS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").rglob("*.*"))
TABLE = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in (BENCHMARKS / "README.md").read_text().splitlines()
    if line.startswith("| ") and "what is claimed" not in line
]
SCRIPT = re.compile(r"\b(?:benchmarks|tests)/[\w/]+\.py\b")
COMMAND = re.compile(r"\bmoescale (\w+)")


def relative(path: Path) -> str:
    return str(path.relative_to(BENCHMARKS))


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def problems_with_command(command: str) -> list[str]:
    """What a reader could not start of it: a script that is not there, a command that the package has not."""
    scripts, commands = SCRIPT.findall(command), COMMAND.findall(command)
    missing = [script for script in scripts if not (ROOT / script).is_file()]
    unknown = [f"moescale {name}" for name in commands if name not in _COMMANDS]
    return missing + unknown if scripts or commands else ["names neither a script nor a command"]


JSON_RESULTS = pytest.mark.parametrize("path", [path for path in RESULTS if path.suffix == ".json"], ids=relative)


@JSON_RESULTS
def test_a_result_names_a_command_whose_script_is_there(path):
    assert problems_with_command(document(path)["command"]) == []


@JSON_RESULTS
def test_a_result_names_a_commit_of_this_history(path):
    commit = document(path)["commit"]
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit)
    git = ["git", "-C", str(ROOT)]
    whole = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if whole.stdout.strip() != "false":
        pytest.skip("no repository with its whole history is here to look for the commit in")
    subprocess.run([*git, "merge-base", "--is-ancestor", commit, "HEAD"], check=True)


@JSON_RESULTS
def test_a_result_names_its_date_and_the_versions_it_was_made_with(path):
    content = document(path)
    datetime.datetime.fromisoformat(content["date"])
    versions = content["versions"]
    assert versions and all(isinstance(version, str) and version for version in versions.values())


@pytest.mark.parametrize("path", RESULTS, ids=relative)
def test_every_result_is_in_the_table(path):
    assert f"({relative(path)})" in (BENCHMARKS / "README.md").read_text()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0][:60])
def test_a_row_of_the_table_leads_to_files_and_scripts_that_are_there(row):
    if row[0].startswith("**"):
        return
    claim, command, result = (*row, "")[:3]
    assert claim
    linked = re.findall(r"\]\(([^)]+)\)", result)
    assert [name for name in linked if not (BENCHMARKS / name).is_file()] == []
    if SCRIPT.search(command) or COMMAND.search(command):
        assert problems_with_command(command) == []
    else:
        assert "probe" in command or "the same" in command


def test_every_script_is_in_the_table():
    text = (BENCHMARKS / "README.md").read_text()
    assert [path.name for path in BENCHMARKS.glob("*.py") if f"benchmarks/{path.name}" not in text] == []


def links_in(page: Path) -> list[Path]:
    found = re.findall(r"\(((?:\.\./)*benchmarks/results/[^)#]+)\)", page.read_text())
    return [(page.parent / link).resolve() for link in found]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_results_that_pages_link_to_are_there(page):
    assert [str(path) for path in links_in(page) if not path.is_file()] == []


def test_readme_quotes_no_probe():
    quoted = {path for path in links_in(ROOT / "README.md") if path.suffix == ".json"}
    assert quoted and not [path.name for path in quoted if "not kept" in document(path)["command"]]


@pytest.mark.parametrize(
    ("command", "problems"),
    [
        ("python benchmarks/no_such.py", ["benchmarks/no_such.py"]),
        ("moescale fly", ["moescale fly"]),
        ("a probe", ["names neither a script nor a command"]),
        ("python benchmarks/step.py; moescale bench experts", []),
    ],
)
def test_a_command_that_cannot_be_started_is_noticed(command, problems):
    assert problems_with_command(command) == problems


def test_a_routing_that_is_forced_even_is_even_and_still_trains_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    route_evenly = importlib.import_module("balanced_run").route_evenly
    logits = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = route_evenly(
        logits, top_k=3, group_limited=False, normalize_topk=False, routed_scaling_factor=1.0, num_sequences=None
    )
    assert routing.tokens_per_expert.tolist() == [9] * 8
    routing.topk_weights.square().sum().backward()
    assert logits.grad is not None and (logits.grad.gather(1, routing.topk_ids.long()) != 0).all()
    expected = logits.detach().gather(1, routing.topk_ids.long()).softmax(1)
    torch.testing.assert_close(routing.topk_weights.detach(), expected)
