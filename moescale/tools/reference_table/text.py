"""The document of ``bench reference`` as tables for a terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from moescale.tools.reference_table.published import read_published
from moescale.tools.reference_table.rows import BACKENDS

_NOTES = """\
MFU of a step as the reference counts it: six FLOPs per active parameter (2.65 B) and token, without attention.
Limit of a step: these FLOPs at the data sheet's rate. Limit of grouped GEMMs: the longer of their FLOPs at that rate
and the bytes that must move at the memory's. Predictions of grouped GEMMs are the rates of the cluster file, as in a
short benchmark: a long run lowers the clock."""


def reference_text(document: dict[str, Any]) -> str:
    """Return the two tables: a step of the whole model, and the grouped GEMMs in the reference's rows and columns."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=110, highlight=False, markup=False, emoji=False)
    console.print(f"reference: {document['source']}", soft_wrap=True)
    console.print(f"prediction and limit: cluster {document['cluster']}")
    steps = _table(
        f"A step of {read_published().step.tokens:,} tokens",
        ("", "GPUs", "step / s", "tokens/s per GPU", "MFU", "from"),
        2,
        5,
    )
    for row in document["step"]:
        cells = (_number(row["step_seconds"], ".3f"), _number(row["tokens_per_second_per_gpu"], ",.0f"))
        where = "the reference" if row["what"] == "published" else row["from"]
        steps.add_row(row["what"], f"{row['gpus']} x {short_name(row['gpu'])}", *cells, _percent(row["mfu"]), where)
    console.print(steps)
    console.print(_grouped_gemm_table(document["grouped_gemm"]))
    if not any(row["what"] == "measured" for row in document["grouped_gemm"]):
        console.print(
            "Nothing measured: give --results a folder with experts.json, written by `moescale bench experts --output`."
        )
    console.print(_NOTES, soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _grouped_gemm_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("# Dispatch\nToken", "# Expert", "forward\n/ ms", "backward\n/ ms", "MFU", "", "of", "GPU")
    table = _table("Grouped GEMMs: the routed experts of one layer", columns, 0, 5)
    before = None
    for row in rows:
        size = (row["tokens"], row["num_experts"])
        if before not in (None, size):
            table.add_section()
        before = size
        times = (f"{row['forward_ms']:.3f}", f"{row['backward_ms']:.3f}")
        table.add_row(*map(str, size), *times, _percent(row["mfu"]), row["what"], origin(row), short_name(row["gpu"]))
    return table


def origin(row: dict[str, Any]) -> str:
    """Return whose times a row of grouped GEMMs has."""
    if row["what"] == "published":
        return "the reference"
    return BACKENDS[row["backend"]] if row["what"] == "measured" else row["from"]


def short_name(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``H100``."""
    return next(iter(gpu.removeprefix("NVIDIA ").split()), gpu)


def _table(title: str, columns: tuple[str, ...], first_number: int, first_text: int) -> Table:
    """A table whose columns from ``first_number`` up to ``first_text`` are numbers."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        is_number = first_number <= index < first_text
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
