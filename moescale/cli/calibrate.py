"""``moescale calibrate``: measure this machine and write a cluster file for ``compile``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from moescale.errors import printable, say
from moescale.files import check_can_be_written, write_atomically
from moescale.planner.cluster import parse_cluster_text


def calibrate_command(output: Path, *, name: str | None = None) -> None:
    """Measure this machine's GPU, and its links if started with torchrun, and write a cluster file.

    Parameters
    ----------
    output
        Cluster file to write (.toml), for `moescale compile --cluster`.
    name
        Name of the cluster; default: the GPU's.
    """
    from moescale.runtime.calibrate import calibrate_machine, to_toml

    check_can_be_written(output, "--output")
    document = calibrate_machine(Console(stderr=True, markup=False, emoji=False).print)
    if document is None:
        return
    if name is not None:
        document["name"] = name
    text = to_toml(document)
    parse_cluster_text(text, str(output))  # checks that `compile` can read the file
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, text)
    say(printable(f"written to {output}"))
