"""``moescale bench``: compares the kernels with their peers on this GPU, and the reference's table with ours."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any, Literal

from moescale.errors import ConfigError, MoescaleError, say
from moescale.files import check_can_be_written, write_atomically

COLUMNS = ("scope", "tokens", "num_experts", "routing", "backend", "forward_ms", "backward_ms", "tflops", "peak_bytes")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""The repository's results, which an installed package does not have."""


class BenchError(MoescaleError, RuntimeError):
    """The machine cannot run a benchmark."""


def bench_command(
    what: Literal["experts", "reference"] = "experts",
    *,
    json: bool = False,
    tune: bool = False,
    model: str | None = None,
    output: Path | None = None,
    cluster: str | None = None,
    results: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Measure the expert kernels next to their peers, or show the reference's performance table next to ours.

    experts measures the expert MLP and the layer from router to combined output, next to PyTorch's grouped GEMM, one
    dense expert and the reference. It takes about two minutes on one GPU; nothing else should run there. With --tune it
    finds the launch parameters of this GPU instead; a table for moescale/kernels/experts/tables is the result.

    reference needs no GPU: it prints the table of nnScaler's DeepSeek example with the planner's prediction for the
    same job, available results, and the machine's limit.

    Parameters
    ----------
    what
        What to show: experts or reference.
    json
        Print the result as JSON on standard output.
    tune
        experts: search launch parameters instead of measuring.
    model
        experts --tune: for the experts of this model, a folder, preset or name on the hub; default:
        deepseek-coder-v2-lite at the sizes of the reference's table.
    output
        Write the JSON here.
    cluster
        reference: whose prediction and limit to show, a name or a cluster file of `moescale calibrate`; default:
        h100-sxm, the reference's machine.
    results
        reference: folder with results named experts.json, of `moescale bench experts --output`; default: those of the
        repository, in a checkout.
    plot
        reference: draw the table here, as .svg, .png or .pdf.
    """
    _check_options(what, tune=tune, model=model, cluster=cluster, results=results, plot=plot)
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{option} ({path}) lies in a folder that does not exist; create {path.parent} first")
        if path is not None:
            check_can_be_written(path, option)
    if what == "reference":
        document = _reference(cluster or "h100-sxm", results, plot)
    else:
        _require_gpu()
        document = _tuned_table(model) if tune else _measured()
    text = json_module.dumps(document, indent=1)
    if output is not None:
        write_atomically(output, text + "\n")
    if json:
        say(text)
    elif what == "reference":
        from moescale.tools.reference_table.text import reference_text

        say(reference_text(document))
    elif tune:
        say(_launch_lines(document))
    else:
        say(_table(document["rows"]))


def _check_options(
    what: str, *, tune: bool, model: str | None, cluster: str | None, results: Path | None, plot: Path | None
) -> None:
    """Raise ConfigError for options that do not apply to ``what``."""
    given = {"--tune": tune, "--model": model, "--cluster": cluster, "--results": results, "--plot": plot}
    for option, value in given.items():
        belongs_to = "experts" if option in ("--tune", "--model") else "reference"
        if value and belongs_to != what:
            raise ConfigError(f"{option} goes with `moescale bench {belongs_to}`, not with {what}; leave it out")
    if model is not None and not tune:
        raise ConfigError("--model goes with `moescale bench experts --tune`; leave it out, or add --tune")


def _reference(cluster: str, results: Path | None, plot: Path | None) -> dict[str, Any]:
    from moescale.planner.cluster import load_cluster
    from moescale.tools.measurement import describe_measurement
    from moescale.tools.reference_table.plot import check_plot, draw_reference
    from moescale.tools.reference_table.rows import reference_rows

    if plot is not None:
        check_plot(plot)
    if results is None:
        results = RESULTS if RESULTS.is_dir() else None
    elif not any(results.rglob("experts.json")):
        raise ConfigError(
            f"--results ({results}) holds no experts.json; write one with `moescale bench experts --output "
            f"{results / 'experts.json'}` on a machine with a GPU"
        )
    document = describe_measurement() | reference_rows(load_cluster(cluster), results)
    if plot is not None:
        draw_reference(document, plot)
    return document


def _require_gpu() -> None:
    import torch

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


def _tuned_table(model: str | None) -> dict[str, Any]:
    from moescale.convert.hf_config import read_model_config
    from moescale.tools.tune_experts import LITE_SHAPES, shapes_of_model, tune

    shapes = LITE_SHAPES
    if model is not None:
        config = read_model_config(model)
        if config.num_experts is None:
            raise ConfigError(f"--model ({model}) has no routed experts to tune; take a mixture of experts")
        shapes = shapes_of_model(config)
    document = tune(shapes)
    return {name: document[name] for name in ("gpu", "entries")}  # without the times of slower candidates


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [COLUMNS, *(tuple("-" if row[c] is None else str(row[c]) for c in COLUMNS) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _launch_lines(document: dict[str, Any]) -> str:
    return "\n".join(
        f"{entry['kernel']:10} {entry['rows']:7} rows {entry['num_experts']:4} experts  {entry['launch']}"
        for entry in document["entries"]
    )
