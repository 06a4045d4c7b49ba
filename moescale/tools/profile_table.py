"""Lays a profile beside the plan: time of a step by kind, planned and measured, and how near GEMMs come to the peak."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from moescale.config import ModelConfig
from moescale.errors import MoescaleError
from moescale.operators import forward_flops
from moescale.plan import ParallelPlan
from moescale.planner.workload import build_workload
from moescale.records import Count, FileKind, Positive, build, read_json_object
from moescale.report.kernel_kinds import kind_of

TOP_KERNELS = 15
NAME_WIDTH = 72
_KIND_OF_OPERATOR = {
    "grouped_gemm": "experts",
    "attention": "attention",
    "dense_gemm": "dense GEMMs",
    "elementwise": "element-wise",
}
_FILE = FileKind(noun="a profile", error=MoescaleError)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of the profiled steps."""

    name: str
    launches: Count
    microseconds: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a profiled run has written into ``kernels.json``."""

    device: str
    first_step: Count
    steps: Positive
    kernels: tuple[Kernel, ...]


def read_profile(path: Path) -> Profile:
    """Read ``kernels.json``. Raises MoescaleError for what is none."""
    return build(Profile, read_json_object(path, _FILE), str(path), _FILE)


def measured_seconds(profile: Profile) -> dict[str, float]:
    """GPU seconds of one step by kind, the longest first."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for kernel in profile.kernels:
        kinds[kind_of(kernel.name)] += kernel.microseconds / 1e6 / profile.steps
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def planned_seconds(plan: ParallelPlan, config: ModelConfig) -> dict[str, float]:
    """Seconds of one step by kind, as the plan predicts them; what is recomputed stands in a line of its own."""
    if plan.prediction is None:
        return {}
    workload = build_workload(config)
    operators = {op.name: op.kind for layer in (*workload.layers, workload.outside) for op in layer.operators}
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, seconds in plan.prediction.breakdown_seconds.items():
        operator_name = name.removeprefix("compute ")
        if name.startswith("communication"):
            kinds["communication"] += seconds
        elif operator_name == "expert_gather_combine":
            kinds["gather and combine"] += seconds
        elif operator_name in operators:
            kinds[_KIND_OF_OPERATOR[operators[operator_name]]] += seconds
        elif name == "gradient accumulation":
            kinds["element-wise"] += seconds
        else:
            kinds[name] += seconds
    return dict(kinds)


def flops(config: ModelConfig, plan: ParallelPlan) -> dict[str, float]:
    """FLOPs of one step of one device by kind, forward and backward, nothing recomputed."""
    workload = build_workload(config)
    dims = workload.dims(plan.tokens_per_step, plan.sequence_length)
    kinds: defaultdict[str, float] = defaultdict(float)
    for layer in (*workload.layers, workload.outside):
        for op in layer.operators:
            if op.kind != "elementwise":
                amount = layer.count * forward_flops(op, dims) * (1 + op.backward_flops_ratio)
                kinds[_KIND_OF_OPERATOR[op.kind]] += amount / plan.runtime_gpus
    return dict(kinds)


def table(profile: Profile, plan: ParallelPlan, config: ModelConfig, peak_flops: float | None) -> str:
    """The profile as text: kinds with the plan's prediction and the part of ``peak_flops``; the longest kernels."""
    measured, planned, work = measured_seconds(profile), planned_seconds(plan, config), flops(config, plan)
    total = sum(measured.values())
    where = f"{profile.steps} steps from step {profile.first_step} on, {profile.device}"
    lines = [
        f"{where}: {1e3 * total:.1f} ms of kernels each",
        f"{'':24}{'ms':>9}{'share':>8}{'planned':>9}{'TFLOP/s':>9}{'of peak':>9}",
    ]
    for kind in (*measured, *(name for name in planned if name not in measured)):
        lines.append(_line(kind, measured.get(kind), total, planned.get(kind), work.get(kind), peak_flops))
    if planned:
        lines.append(f"{'in all':24}{1e3 * total:9.1f}{1.0:8.0%}{1e3 * sum(planned.values()):9.1f}")
    lines.append("the longest kernels, ms and launches a step:")
    for kernel in profile.kernels[:TOP_KERNELS]:
        milliseconds, launches = kernel.microseconds / 1e3 / profile.steps, kernel.launches / profile.steps
        lines.append(f"{milliseconds:9.2f} {launches:7.0f} x  {kernel.name[:NAME_WIDTH]}")
    return "\n".join(lines)


def _line(
    kind: str,
    measured: float | None,
    total: float,
    planned: float | None,
    work: float | None,
    peak_flops: float | None,
) -> str:
    line = f"{kind:24}" + (
        f"{1e3 * measured:9.1f}{measured / total:8.0%}" if measured is not None else f"{'-':>9}{'':8}"
    )
    line += f"{1e3 * planned:9.1f}" if planned is not None else f"{'-':>9}"
    if work and measured:
        rate = work / measured
        line += f"{rate / 1e12:9.0f}" + (f"{rate / peak_flops:9.0%}" if peak_flops else "")
    return line
