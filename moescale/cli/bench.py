"""``moescale bench``: the kernels beside their peers, on the GPU at hand."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any, Literal

import torch

from moescale.errors import ConfigError, MoescaleError, say
from moescale.files import write_atomically

COLUMNS = ("scope", "tokens", "num_experts", "routing", "backend", "forward_ms", "backward_ms", "tflops", "peak_bytes")


class BenchError(MoescaleError, RuntimeError):
    """The machine cannot run a benchmark."""


def bench_command(
    what: Literal["experts"] = "experts",
    *,
    json: bool = False,
    tune: bool = False,
    output: Path | None = None,
) -> None:
    """Measure the expert kernels beside PyTorch's grouped product, one dense expert and the reference.

    Takes about two minutes on one GPU; nothing else should run there. With --tune, find the launch parameters of this
    GPU instead; a table for moescale/kernels/experts/tables is the result.

    Parameters
    ----------
    what
        What to measure: experts, the expert MLP and the layer from router to combined output.
    json
        Print the result as JSON on standard output.
    tune
        Search launch parameters instead of measuring.
    output
        Write the JSON here.
    """
    _require_gpu()
    if output is not None and not output.resolve().parent.is_dir():
        raise ConfigError(f"--output ({output}) lies in a folder that does not exist; create {output.parent} first")
    document = _tuned_table() if tune else _measured()
    text = json_module.dumps(document, indent=1)
    if output is not None:
        write_atomically(output, text + "\n")
    if json:
        say(text)
    elif tune:
        say(_launch_lines(document))
    else:
        say(_table(document["rows"]))


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise BenchError(
            "moescale bench measures kernels on a CUDA GPU, and PyTorch sees none here; run it on a machine with a GPU "
            "and a CUDA build of PyTorch (torch.cuda.is_available() must be true)"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise BenchError(
            f"moescale bench needs a GPU of CUDA capability 8.0 or newer; {torch.cuda.get_device_name()} has "
            f"{capability[0]}.{capability[1]}"
        )


def _measured() -> dict[str, Any]:
    from moescale.tools.bench_experts import bench_experts

    return bench_experts()


def _tuned_table() -> dict[str, Any]:
    from moescale.tools.tune_experts import tune

    document = tune()
    return {name: document[name] for name in ("gpu", "entries")}  # without the times of all the losers


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [COLUMNS, *(tuple("-" if row[c] is None else str(row[c]) for c in COLUMNS) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _launch_lines(document: dict[str, Any]) -> str:
    return "\n".join(
        f"{entry['kernel']:10} {entry['rows']:7} rows {entry['num_experts']:4} experts  {entry['launch']}"
        for entry in document["entries"]
    )
