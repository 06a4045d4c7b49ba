"""How many GPUs a model needs, and what more of them bring."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moescale.config import ModelConfig
from moescale.errors import ConfigError
from moescale.plan import unsupported_sizes
from moescale.planner.cluster import Cluster
from moescale.planner.request import PlanRequest, recompute_name
from moescale.planner.result import Evaluated
from moescale.planner.search import compile_plan
from moescale.planner.workload import Workload

LARGEST = 1024


@dataclass(frozen=True, kw_only=True)
class FitPoint:
    """The best plan on a number of GPUs."""

    gpus: int
    tokens_per_step: int
    """The request's, or one sequence per GPU where that is more."""
    best: Evaluated | None
    """None: nothing fits."""

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together; 0 where nothing fits."""
        return self.tokens_per_step / self.best.time.total if self.best else 0.0

    @property
    def unsupported(self) -> str:
        """The axes that this version's runtime lacks, as ``pp 2, tp 4``; empty for a plan it can run."""
        if self.best is None or self.best.supported:
            return ""
        return ", ".join(f"{axis} {size}" for axis, size in unsupported_sizes(self.best.candidate.mesh).items())


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Answer to: on how few GPUs does it fit, and how does its speed grow."""

    smallest: FitPoint | None
    """None: not even on the largest number looked at."""
    points: tuple[FitPoint, ...]
    """1, 2, 4, ... 1024 GPUs."""


def fit_to_gpus(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    largest: int = LARGEST,
    workload: Workload | None = None,
) -> FitResult:
    """Plan for 1, 2, 4, ... ``largest`` GPUs and find the smallest number that fits.

    ``runtime_gpus`` and ``plan_gpus`` of the request are ignored; everything else holds. Tokens per step grow where
    the request's do not give every GPU a whole number of sequences. ``workload``, and errors, as for ``compile_plan``.
    """
    points, errors = [], []
    gpus = 1
    while gpus <= largest:
        try:
            points.append(_plan(config, cluster, request, gpus, workload))
        except ConfigError as error:  # no plan has these sizes: a pin, or divisibility
            errors.append(error)
            points.append(FitPoint(gpus=gpus, tokens_per_step=_tokens(request, gpus), best=None))
        gpus *= 2
    if len(errors) == len(points):  # whatever the number of GPUs, so the request's fault
        raise errors[0]
    fitting = [point for point in points if point.best is not None]
    smallest = fitting[0] if fitting else None
    for gpus in _between(smallest.gpus, cluster.gpus_per_node) if smallest else ():
        try:
            point = _plan(config, cluster, request, gpus, workload)
        except ConfigError:
            continue
        if point.best is not None:
            smallest = point
            break
    return FitResult(smallest=smallest, points=tuple(points))


def _between(fitting: int, gpus_per_node: int) -> Iterator[int]:
    """Numbers above half of ``fitting``, on which nothing fits, and below it: whole nodes where there are several."""
    step = 1 if fitting <= gpus_per_node else gpus_per_node
    yield from range(fitting // 2 + step, fitting, step)


def _tokens(request: PlanRequest, gpus: int) -> int:
    """Tokens per step of the request, rounded up to whole sequences on each of ``gpus``."""
    unit = gpus * request.sequence_length
    return -(-request.tokens_per_step // unit) * unit


def _plan(
    config: ModelConfig, cluster: Cluster, request: PlanRequest, gpus: int, workload: Workload | None
) -> FitPoint:
    """Raises ConfigError where no plan has the sizes asked for."""
    tokens = _tokens(request, gpus)
    changed = dataclasses.replace(request, runtime_gpus=gpus, plan_gpus=None, tokens_per_step=tokens)
    best = compile_plan(config, cluster, changed, workload=workload, with_alternatives=False).best
    return FitPoint(gpus=gpus, tokens_per_step=tokens, best=best)


def fit_json(result: FitResult) -> dict[str, Any]:
    """The result as JSON-able values."""
    return {
        "smallest_gpus": result.smallest.gpus if result.smallest else None,
        "smallest_supported": not result.smallest.unsupported if result.smallest else None,
        "points": [_point_json(point) for point in result.points],
    }


def _point_json(point: FitPoint) -> dict[str, Any]:
    fields: dict[str, Any] = {"gpus": point.gpus, "tokens_per_step": point.tokens_per_step, "fits": False}
    if point.best is not None:
        fields |= {
            "fits": True,
            "supported": point.best.supported,
            "step_seconds": point.best.time.total,
            "tokens_per_second": point.tokens_per_second,
            "peak_bytes": round(point.best.memory.total),
            "decisions": point.best.decisions,
        }
    return fields


def fit_text(result: FitResult) -> str:
    """The result as a table."""
    table = Table(box=None, header_style="bold")
    for heading in ("GPUs", "tokens/step", "s/step", "tokens/s", "tokens/s per GPU", "peak GiB", "plan"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for point in result.points:
        table.add_row(str(point.gpus), f"{point.tokens_per_step:,}", *_cells(point))
    gpus = (result.smallest or result.points[-1]).gpus
    answer = f"{'fits' if result.smallest else 'does not fit'} on {gpus} GPU{'' if gpus == 1 else 's'}"
    if result.smallest and result.smallest.unsupported:
        answer += f", by a plan that this version's runtime cannot run ({result.smallest.unsupported})"
    with io.StringIO() as text:
        console = Console(file=text, width=160, color_system=None, markup=False, emoji=False)
        console.print(table)
        console.print(answer)
        return text.getvalue().rstrip()


def _recompute(best: Evaluated) -> str:
    """Return what is recomputed, by layer kind where the kinds differ."""
    names = {layer.kind: recompute_name(layer) for layer in best.candidate.layers}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return " and ".join(f"{name} ({kind})" for kind, name in names.items())


def _cells(point: FitPoint) -> tuple[str, ...]:
    if point.best is None:
        return "-", "-", "-", "-", "does not fit"
    decisions = point.best.decisions
    unit = point.best.candidate.mesh.copy_gpus
    plan = (
        f"unit of {unit}, ep {decisions['ep']}, micro-batch {decisions['micro_batch_sequences']}, "
        f"recompute {_recompute(point.best)}, moments {decisions['optimizer_state_dtype']}"
    )
    in_fp8 = [name.removesuffix("_gemms") for name, value in vars(point.best.candidate.gemms).items() if value == "fp8"]
    if in_fp8:
        plan += f", GEMMs in fp8: {' and '.join(name.replace('expert', 'experts') for name in in_fp8)}"
    if point.unsupported:
        plan += f"; not supported by this version's runtime: {point.unsupported}"
    speed = point.tokens_per_second
    return (
        f"{point.best.time.total:.3f}",
        f"{speed:,.0f}",
        f"{speed / point.gpus:,.0f}",
        f"{point.best.memory.total / 2**30:.1f}",
        plan,
    )
