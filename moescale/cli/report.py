"""``moescale report``: write a page about a run, or one that compares several runs."""

from __future__ import annotations

from pathlib import Path

from moescale.cli.missing import advice
from moescale.errors import ConfigError, printable, say
from moescale.files import write_atomically


def report_command(*run: Path, output: Path | None = None) -> None:
    """Write one HTML page about a run, or one that compares several runs, including running and failed ones.

    Parameters
    ----------
    run
        Folder of a run; several are compared.
    output
        Page to write; default: report.html in the folder of the (first) run.
    """
    from datetime import datetime

    from moescale.tools.report.page import comparison_page, run_page
    from moescale.tools.report.run_data import read_run

    if not run:
        raise ConfigError(f"report needs the folder of a run, or of several to compare; {advice('report')}")
    runs = [read_run(folder) for folder in run]
    now = datetime.now()
    page = run_page(runs[0], now) if len(runs) == 1 else comparison_page(runs, now)
    target = output or run[0] / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page)
    say(printable(f"written to {target}"))
