"""Puts prediction, measurements and limits next to the reference's published rows: the document of ``bench reference``.

Every row says what it is (``published``, ``measured``, ``predicted`` or ``limit``), on which GPU, and from which file
or cluster. Rows of ``step`` are steps of the whole model, those of ``grouped_gemm`` the routed experts of one layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moescale.convert.hf_config import read_model_config
from moescale.planner.cluster import SHIPPED, Cluster, load_cluster
from moescale.planner.request import PlanRequest
from moescale.planner.result import excess_text
from moescale.planner.search import compile_plan
from moescale.records import FileKind, Positive, Range, build, read_json_object
from moescale.tools.reference_table.published import PublishedRow, read_published

BACKENDS = {
    "grouped_mm": "torch grouped_mm, compiled",
    "triton": "moescale, Triton",
    "cute": "moescale, CuTe",
    "dense": "one dense expert, cuBLAS",
}
"""Backends in results of ``bench experts``, in the order of the table."""
STEP_RESULTS = ("h200/step.json", "h100x2/whole.json")
"""Results in benchmarks/results that measure whole steps of this model, as many tokens a step."""
_EXPERTS = FileKind(
    noun="a result of `moescale bench experts`",
    remedy="write it again with `moescale bench experts --output FILE`",
    ignores_unknown=True,
)
_STEP = FileKind(noun="a result of a whole step", remedy="restore it from the repository", ignores_unknown=True)
PositiveNumber = Annotated[float, Range(above=0)]


@dataclass(frozen=True, kw_only=True)
class _ExpertsResult:
    gpu: str
    rows: tuple[dict[str, Any], ...]
    """Those of scope mlp are read as :class:`_ExpertsRow`."""


@dataclass(frozen=True, kw_only=True)
class _ExpertsRow:
    backend: str
    tokens: Positive
    num_experts: Positive
    top_k: Positive
    forward_ms: PositiveNumber
    backward_ms: PositiveNumber


@dataclass(frozen=True, kw_only=True)
class _StepResult:
    tokens_per_second: PositiveNumber
    gpu: str = ""
    gpus: str = ""
    """For example ``2 x NVIDIA H100 80GB HBM3, one host``; where empty, ``gpu`` is one."""

    def machine(self) -> tuple[int, str]:
        """Return the number of GPUs, and what they are."""
        number, _, gpu = (self.gpus or self.gpu).partition(",")[0].rpartition(" x ")
        return (int(number) if number.isdecimal() else 1), gpu


def reference_rows(cluster: Cluster, results: Path | None) -> dict[str, Any]:
    """Return ``source``, ``cluster``, and the rows of ``step`` and ``grouped_gemm``.

    Args:
        cluster: what the prediction and the limit are for.
        results: folder with results of ``bench experts`` named experts.json, and those of ``STEP_RESULTS``, at any
            depth; None for no measured rows.

    Raises:
        ConfigError: a result cannot be read, or a field of it breaks its rule.
    """
    measured = []
    if results is not None:
        measured = [row for path in sorted(results.rglob("experts.json")) for row in _measured_experts(path, results)]
    return {
        "source": read_published().source,
        "cluster": cluster.name,
        "cluster_fingerprint": cluster.fingerprint(),
        "step": [*_published_step(), *_measured_steps(results), *_predicted_step(cluster)],
        "grouped_gemm": [
            {"tokens": size.tokens, "num_experts": size.num_experts} | row
            for size in read_published().grouped_gemm.rows
            for row in _rows_of_size(size, cluster, measured)
        ],
    }


def _published_step() -> Iterator[dict[str, Any]]:
    published = read_published()
    step = published.step
    yield {
        **_step_row("published", published.gpu, step.gpus, step.seconds, published.peak_flops_per_second),
        "mfu": step.mfu,
        "from": published.source,
    }


def _step_row(what: str, gpu: str, gpus: int, seconds: float, peak: float | None) -> dict[str, Any]:
    step = read_published().step
    rate = step.tokens / seconds / gpus
    return {
        "what": what,
        "gpu": gpu,
        "gpus": gpus,
        "step_seconds": seconds,
        "tokens_per_second_per_gpu": rate,
        "mfu": None if peak is None else step.mfu_at(rate, peak),
    }


def _measured_steps(results: Path | None) -> Iterator[dict[str, Any]]:
    """Yield whole steps from the repository's results, where they are."""
    for name in STEP_RESULTS:
        if results is None or not (path := results / name).is_file():
            continue
        result = build(_StepResult, read_json_object(path, _STEP), str(path), _STEP)
        gpus, gpu = result.machine()
        seconds = read_published().step.tokens / result.tokens_per_second
        yield _step_row("measured", gpu, gpus, seconds, _peak_of(gpu)) | {"from": name}


def _predicted_step(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Yield the planner's prediction for the published job, and the time of its FLOPs alone."""
    published = read_published()
    step, peak = published.step, cluster.peak_flops_per_second
    request = PlanRequest(
        runtime_gpus=step.gpus,
        plan_gpus=step.plan_gpus,
        tokens_per_step=step.tokens,
        sequence_length=step.sequence_length,
    )
    result = compile_plan(read_model_config(published.model), cluster, request)
    if result.best is not None:
        seconds = result.best.time.total
        yield _step_row("predicted", cluster.gpu, step.gpus, seconds, peak) | {"from": cluster.name}
    else:
        nothing = dict.fromkeys(("step_seconds", "tokens_per_second_per_gpu", "mfu"))
        reason = f"{cluster.name}: nothing fits, exceeds {excess_text(result, result.near_misses[0])}"
        yield {"what": "predicted", "gpu": cluster.gpu, "gpus": step.gpus, **nothing, "from": reason}
    least = 6 * step.active_parameters * step.tokens / step.gpus / peak
    yield _step_row("limit", cluster.gpu, step.gpus, least, peak) | {"from": cluster.name}


def _rows_of_size(size: PublishedRow, cluster: Cluster, measured: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    published = read_published()
    table = published.grouped_gemm
    peak, flops = cluster.peak_flops_per_second, table.forward_flops(size)
    yield {
        "what": "published",
        "gpu": published.gpu,
        "backend": "nnScaler, grouped_gemm 1.1.4",
        **_times(size, (size.forward_ms, size.backward_ms), published.peak_flops_per_second),
        "mfu": size.mfu,
        "from": published.source,
    }
    for row in measured:
        if (row["tokens"], row["num_experts"]) == (size.tokens, size.num_experts):
            times = _times(size, (row["forward_ms"], row["backward_ms"]), _peak_of(row["gpu"]))
            yield {name: row[name] for name in ("what", "gpu", "backend")} | times | {"from": row["from"]}
    # Without the sustained clock and without launches, as a short benchmark of kernels queued ahead is measured.
    rate = cluster.grouped_gemm.at(size.tokens * table.top_k / size.num_experts)
    predicted = (1e3 * flops / rate, 1e3 * 2 * flops / rate)
    limit = table.limit_ms(size, peak, cluster.memory_bytes_per_second)
    for what, times_ms in (("predicted", predicted), ("limit", limit)):
        row = {"what": what, "gpu": cluster.gpu, "backend": None}
        yield row | _times(size, times_ms, peak) | {"from": cluster.name}


def _times(size: PublishedRow, times_ms: tuple[float, float], peak: float | None) -> dict[str, Any]:
    rate = 3 * read_published().grouped_gemm.forward_flops(size) / (1e-3 * sum(times_ms))
    return {
        "forward_ms": round(times_ms[0], 4),
        "backward_ms": round(times_ms[1], 4),
        "tflops": round(rate / 1e12, 1),
        "mfu": None if peak is None else rate / peak,
    }


def _measured_experts(path: Path, root: Path) -> list[dict[str, Any]]:
    """The expert MLP with uniform routing in a result of ``bench experts``, in the order of BACKENDS."""
    result = build(_ExpertsResult, read_json_object(path, _EXPERTS), str(path), _EXPERTS)
    found = []
    for fields in result.rows:
        if (fields.get("scope"), fields.get("routing")) != ("mlp", "uniform"):
            continue
        row = build(_ExpertsRow, fields, str(path), _EXPERTS)
        if row.backend in BACKENDS and row.top_k == read_published().grouped_gemm.top_k:
            origin = {"what": "measured", "gpu": result.gpu, "from": str(path.relative_to(root))}
            found.append(dataclasses.asdict(row) | origin)
    return sorted(found, key=lambda row: list(BACKENDS).index(row["backend"]))


@functools.cache
def _peak_of(gpu: str) -> float | None:
    """The data sheet's FLOP/s of a GPU that a shipped cluster has; None for others."""
    clusters = (load_cluster(path.stem) for path in SHIPPED.glob("*.toml"))
    return next((cluster.peak_flops_per_second for cluster in clusters if cluster.gpu == gpu), None)
