"""``moescale doctor``: reports what works on this machine, what does not, and how to fix it."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from moescale.errors import printable, say

if TYPE_CHECKING:
    from moescale.tools.doctor import Finding

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def doctor_command(
    *,
    cluster: str | None = None,
    output: Path | None = None,
    measure: bool = True,
    json: bool = False,
) -> None:
    """Examine this machine: GPUs, packages, links, memory, disk; what works, and the command that fixes the rest.

    Exit status 2 if something prevents moescale from working, 0 with warnings.

    Parameters
    ----------
    cluster
        Cluster file, by name or path, to compare with a measurement of a few seconds.
    output
        Folder that a run would write to, whose disk is checked; default: the working directory.
    measure
        Measure GPUs and links, for a few seconds each; nothing else should run on them.
    json
        Print the findings as JSON on standard output.
    """
    from moescale.tools.doctor import MachineUnfit, examine

    findings = []
    console = Console(markup=False, emoji=False, highlight=False)
    for finding in examine(cluster=cluster, output=output, measure=measure):
        findings.append(finding)
        if not json:
            show(finding, console)
    if json:
        say(json_module.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    problems = [finding for finding in findings if finding.status == "problem"]
    if problems:
        names = ", ".join(finding.name for finding in problems)
        raise MachineUnfit(f"doctor: {names}: see above; moescale does not work here before that is mended")


def show(finding: Finding, console: Console) -> None:
    """Print one finding, with its remedy on a separate line."""
    line = Text(f"{finding.status:8}", style=_STYLES[finding.status])
    line.append(f"{finding.name:20}", style="bold").append(printable(finding.detail), style="default")
    console.print(line, soft_wrap=True)
    if finding.remedy:
        console.print(Text(" " * 28 + printable(finding.remedy), style="dim"), soft_wrap=True)
