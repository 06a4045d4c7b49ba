"""``moescale export``: write a run's weights as a Hugging Face checkpoint."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from moescale.api.export import ExportSettings, export
from moescale.convert.adapter_folder import AdapterReport
from moescale.errors import printable, say


def export_command(settings: Annotated[ExportSettings, Parameter(name="*")], *, json: bool = False) -> None:
    """Write a run's weights as a Hugging Face checkpoint that transformers opens without remote code.

    Parameters
    ----------
    json
        Print a summary as JSON on standard output.
    """
    summary = export(settings, progress=not json)
    report = summary.report
    if json:
        document = asdict(report) | {"output": str(report.output), "step": summary.step, "dtype": summary.dtype}
        say(json_module.dumps(document, indent=2))
        return
    if isinstance(report, AdapterReport):
        text = f"exported the adapters of step {summary.step} to {settings.output} ({report.num_tensors} tensors)"
        say(printable(text))
        return
    shards = f"{report.num_shards} shard{'s' * (report.num_shards > 1)}"
    say(printable(f"exported step {summary.step} as {summary.dtype} to {settings.output} ({shards})"))
    for warning in report.warnings:
        say(printable(f"warning: {warning}"))
