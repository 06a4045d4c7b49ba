"""Examines, in well under a second, whether this machine can do the job that ``moescale run`` was given.

The short form of ``moescale doctor``: it measures nothing, and looks at what this very run needs: room on the disk for
its checkpoints, free memory on the GPU, the GPU that its plan was made for, packages that its settings name.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moescale.config import ModelConfig
from moescale.kernels.backends import BackendSettings, CutePart
from moescale.models.lora import add_adapters
from moescale.models.transformer import build_on_meta, named_weights
from moescale.plan import ParallelPlan
from moescale.planner.cluster import SHIPPED, Cluster, load_cluster
from moescale.runtime.mapping import optimizer_format
from moescale.runtime.optimizer import AdamW
from moescale.runtime.session import COMPUTE_DTYPES
from moescale.runtime.settings import TrainSettings
from moescale.tools.doctor import Finding, Status, examine_cute, limits, nearest_existing

MIN_MEMORY_FRACTION = 0.9
"""Of the plan's peak. With less of it free the run is refused: predictions of the peak are off by a few percent."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank is about to do."""

    config: ModelConfig
    plan: ParallelPlan
    settings: TrainSettings
    backends: BackendSettings
    device: torch.device
    checkpoints: Path
    """Folder of the run's checkpoints; it need not exist."""
    num_checkpoints: int
    """Those that are there already."""
    steps_left: int


def examine_job(job: Job, *, is_first: bool = True) -> Iterator[Finding]:
    """Yield what is found about ``job`` on this rank; the first rank looks at what it shares with the others, too."""
    if is_first:
        yield from disk(job)
        yield from limits()
    if job.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(job.device)
        free += torch.cuda.memory_reserved(job.device)
        yield gpu_memory(job.plan, free, total, name=f"memory of GPU {job.device.index}")
        yield from planned_gpu(job.plan, torch.cuda.get_device_name(job.device))
        yield from experts_in_fp8(job.plan, job.backends)
    yield from packages(job.backends, job.device)


def disk(job: Job) -> Iterator[Finding]:
    """Whether the disk takes the checkpoints that the run keeps, and the one it writes before it deletes another."""
    number = checkpoints_to_come(job.settings, job.steps_left, job.num_checkpoints)
    if number == 0:
        return
    usage = shutil.disk_usage(nearest_existing(job.checkpoints))
    if usage.total == 0:  # a file system that does not know its size
        return
    size = checkpoint_bytes(job.config, job.plan)
    if usage.free < size:
        yield Finding(
            name="disk",
            status="problem",
            detail=f"{job.checkpoints}: a checkpoint has {size:,} bytes, the disk {usage.free:,} left",
            remedy="free space, or choose another --output",
        )
    elif usage.free < number * size:
        fitting = usage.free // size
        yield Finding(
            name="disk",
            status="warning",
            detail=f"{job.checkpoints}: the run adds {number} checkpoints of {size:,} bytes, one of them before it "
            f"deletes the oldest; the disk has {usage.free:,} left, enough for {fitting}",
            remedy="free space, choose another --output, or keep fewer with --keep-checkpoints",
        )
    else:
        detail = f"{usage.free:,} bytes free for {number} more checkpoints of {size:,}"
        yield Finding(name="disk", status="ok", detail=detail)


def checkpoints_to_come(settings: TrainSettings, steps_left: int, num_present: int) -> int:
    """By how many checkpoints the folder grows at most: a new one is whole before the oldest is deleted."""
    if steps_left <= 0 or not settings.writes_checkpoints:
        return 0
    writes = float(settings.final_checkpoint)
    if settings.checkpoint_every:
        writes = math.ceil(steps_left / settings.checkpoint_every)
    if settings.checkpoint_minutes:
        writes = math.inf
    most = min(num_present + writes, settings.keep_checkpoints + 1)
    return max(1, int(most) - num_present)


def checkpoint_bytes(config: ModelConfig, plan: ParallelPlan) -> int:
    """Size of a checkpoint's tensors: weights and optimizer state of what is trained, in the plan's formats.

    The model and its optimizer are built without memory.
    """
    model = build_on_meta(config, COMPUTE_DTYPES[plan.compute_dtype])
    if plan.lora is not None:
        with torch.device("meta"):
            add_adapters(model, plan.lora)
    names = {name for name, _ in model.named_parameters()}
    size = sum(tensor.nbytes for name, tensor in named_weights(model).items() if name not in names)
    in_place = replace(optimizer_format(plan), offload=False)
    optimizer = AdamW(model.named_parameters(), TrainSettings(), in_place)
    return size + sum(tensor.nbytes for tensor in optimizer.tensors().values())


def gpu_memory(plan: ParallelPlan, free: int, total: int, *, name: str = "GPU memory") -> Finding:
    """``free`` and ``total`` bytes of the GPU against the peak that the plan predicts."""
    if plan.prediction is None:
        return Finding(name=name, status="ok", detail=f"{free / 2**30:.1f} GiB free; the plan predicts no peak")
    peak = plan.prediction.peak_bytes
    # The context is made already, so it is not free any more.
    available = min(total, free + plan.prediction.breakdown_bytes.get("context", 0))
    predicted = f"the plan predicts {peak / 2**30:.1f} GiB on a GPU"
    if peak <= available:
        return Finding(name=name, status="ok", detail=f"{predicted}, {available / 2**30:.1f} GiB are free")
    status: Status = "problem" if available < MIN_MEMORY_FRACTION * peak else "warning"
    if peak > total:
        return Finding(
            name=name,
            status=status,
            detail=f"{predicted}, this one has {total / 2**30:.1f} GiB",
            remedy=f"compile for this cluster, or with --memory-limit {0.95 * total / 2**30:.0f}",
        )
    return Finding(
        name=name,
        status=status,
        detail=f"{predicted}, {available / 2**30:.1f} of {total / 2**30:.1f} GiB are free",
        remedy="nvidia-smi shows which process has the rest; end it, or compile with --memory-limit "
        f"{math.floor(available / 2**30)}",
    )


def planned_gpu(plan: ParallelPlan, gpu: str) -> Iterator[Finding]:
    """Whether the cluster file that the plan was made for is of this GPU; only files that moescale ships are known."""
    cluster = _shipped_cluster(plan.cluster_fingerprint)
    if cluster is None:
        return
    if cluster.gpu == gpu:
        yield Finding(name="cluster file", status="ok", detail=f"the plan is for {cluster.name}, this is one ({gpu})")
        return
    yield Finding(
        name="cluster file",
        status="warning",
        detail=f"the plan is for {cluster.name} ({cluster.gpu}), this is a {gpu}; its predictions hold for the former",
        remedy="moescale calibrate --output my.toml, then compile --cluster my.toml",
    )


def experts_in_fp8(plan: ParallelPlan, backends: BackendSettings) -> Iterator[Finding]:
    """Whether the settings name a backend for experts that the plan's GEMMs in fp8 do not have."""
    if plan.expert_gemms == "fp8" and backends.experts not in ("auto", "triton"):
        yield Finding(
            name="experts in fp8",
            status="warning",
            detail=f"plan.expert_gemms (fp8) is computed in Triton, not by the backend named ({backends.experts})",
            remedy="drop --experts-backend, or use --precision bf16",
        )


def _shipped_cluster(fingerprint: str) -> Cluster | None:
    clusters = (load_cluster(path.stem) for path in sorted(SHIPPED.glob("*.toml")))
    return next((cluster for cluster in clusters if cluster.fingerprint() == fingerprint), None)


def packages(backends: BackendSettings, device: torch.device) -> Iterator[Finding]:
    """Packages of the extra ``cute`` on a GPU: a problem where the settings name what is missing or does not load.

    Those of observers are looked for where these are made, and that CuTe runs on no CPU the kernels say themselves.
    """
    if device.type != "cuda":
        return
    asked: dict[CutePart, str] = {"experts": backends.experts, "attention": backends.attention}
    for part, backend in asked.items():
        finding = examine_cute(part)
        if backend == "cute" and finding.status != "ok":
            detail = f"{finding.detail}; --{part}-backend cute names it"
            finding = replace(finding, status="problem", detail=detail)
        yield finding
