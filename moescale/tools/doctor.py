"""Examines the machine: what will work, what will not, and the command that mends it (``moescale doctor``).

Each check is a function that returns findings. None changes anything on the machine. Measurements take seconds.
They find the GPU that another process uses, the link that fell back to PCIe and the cluster file of another machine,
which no version number shows.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moescale.errors import MoescaleError
from moescale.kernels.backends import CUTE_PACKAGES, HOPPER, MINIMUM_CAPABILITY, CutePart
from moescale.planner.cluster import Cluster, load_cluster
from moescale.runtime.device import available_host_bytes
from moescale.runtime.gpu_clock import copy_rate, seconds_of

Status = Literal["ok", "note", "warning", "problem"]
TOLERANCE = 0.15
"""Relative distance from a cluster file at which its predictions are no longer those of this machine."""
MIN_FREE_DEVICE_FRACTION = 0.95
MIN_OPEN_FILES = 1024
MIN_SHARED_MEMORY_BYTES = 256 * 2**20
GEMM_SIZE = 8192
PEER_BYTES = 2**28
MIN_PEER_FRACTION = 0.5
"""Of the link in the cluster file; a copy between GPUs reaches about 80% of what an exchange of many messages does."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    name: str
    """What was examined, a few words."""
    status: Status
    """``note`` is worth knowing, ``warning`` costs speed or may end a run, ``problem`` stops moescale from working."""
    detail: str
    """What was found, with values."""
    remedy: str = ""
    """What mends it: a command where there is one. Empty where nothing is wrong."""


def examine(*, cluster: str | None = None, output: Path | None = None, measure: bool = True) -> Iterator[Finding]:
    """Yield the findings of all checks, in the order in which they are made.

    Args:
        cluster: name or path of a cluster file to compare with a short measurement; None compares nothing.
        output: folder whose disk a run would write to; None: the working directory.
        measure: spend seconds on the GPUs. Without, only what can be looked up is examined.

    Raises ConfigError for a cluster file that cannot be read.
    """
    described = None if cluster is None else load_cluster(cluster)
    yield from software()
    yield from extras()
    yield from gpus()
    yield from host(output or Path.cwd())
    if torch.cuda.is_available():
        yield from peers(described, measure=measure)
        if measure:
            yield from speed(described)


def software() -> Iterator[Finding]:
    """Versions of Python and of what every command needs."""
    yield Finding(name="python", status="ok", detail=f"{platform.python_version()} on {platform.platform()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding(name="torch", status="ok", detail=f"{torch.__version__}, {build}")
    triton = _version("triton")
    if triton is None and torch.cuda.is_available():
        yield Finding(
            name="triton",
            status="problem",
            detail="not installed; kernels on a GPU need it",
            remedy="pip install 'triton>=3.6'",
        )
    elif triton is not None:
        yield Finding(name="triton", status="ok", detail=triton)


def extras() -> Iterator[Finding]:
    """Optional packages: whether they are installed and, if so, whether they load."""
    for part in CUTE_PACKAGES:
        yield examine_cute(part)
    for package, use in (("datasets", "prepare from the hub"), ("transformers", "opening exports")):
        version = _version(package)
        if version is None:
            remedy = "pip install 'moescale[hub]'" if package == "datasets" else f"pip install {package}"
            yield Finding(name=package, status="note", detail=f"not installed; {use} needs it", remedy=remedy)
        else:
            yield Finding(name=package, status="ok", detail=version)


def examine_cute(part: CutePart) -> Finding:
    """Whether a part of the extra ``cute`` is installed and, on the GPUs that it is for, loads."""
    module, package = CUTE_PACKAGES[part]
    name = f"CuTe for {part}"
    version = _version(package)
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
    if version is None:
        gain = "a step is a few percent slower without" if is_hopper else "it is for Hopper GPUs"
        return Finding(
            name=name,
            status="note",
            detail=f"{package} is not installed; {gain}",
            remedy="pip install 'moescale[cute]'",
        )
    if not is_hopper:
        return Finding(name=name, status="ok", detail=f"{package} {version}; used on Hopper GPUs only")
    try:
        importlib.import_module(module)
        importlib.import_module(f"moescale.kernels.{part}.cute")
    except Exception as error:  # whatever a broken installation raises
        return Finding(
            name=name,
            status="warning",
            detail=f"{package} {version} does not load ({type(error).__name__}: {error}); slower kernels run instead",
            remedy="pip install --force-reinstall 'moescale[cute]', or pip uninstall " + package,
        )
    return Finding(name=name, status="ok", detail=f"{package} {version} loads")


def gpus() -> Iterator[Finding]:
    """Each GPU: its generation and how much of its memory is free."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            detail, remedy = "torch was built without CUDA", "install a CUDA build: https://pytorch.org/get-started"
        elif Path("/proc/driver/nvidia/version").is_file():
            detail = "the driver is loaded, but torch sees no device"
            remedy = f"nvidia-smi; CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
        else:
            detail, remedy = "no NVIDIA driver is loaded", "nvidia-smi; inside a container, start it with --gpus all"
        yield Finding(name="GPU", status="note", detail=f"none: {detail}. Small models train on the CPU", remedy=remedy)
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    name = f"GPU {index}"
    free, total = torch.cuda.mem_get_info(index)
    detail = f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    capability = (properties.major, properties.minor)
    if capability < MINIMUM_CAPABILITY:
        detail += f"; capability {capability[0]}.{capability[1]} is below 8.0, so kernels run in plain torch"
        return Finding(name=name, status="warning", detail=detail, remedy="use an Ampere GPU or a newer one")
    if free < MIN_FREE_DEVICE_FRACTION * total:
        detail += "; plans count on all of it"
        remedy = "nvidia-smi shows who uses it; or moescale compile --memory-limit with what is free"
        return Finding(name=name, status="warning", detail=detail, remedy=remedy)
    return Finding(name=name, status="ok", detail=detail)


def host(output: Path) -> Iterator[Finding]:
    """Memory, disk and limits of the host, the last by :func:`limits`."""
    memory = available_host_bytes()
    yield Finding(name="host memory", status="ok", detail=f"{memory / 2**30:.0f} GiB available")
    yield _disk(output)
    yield from limits()


def limits() -> Iterator[Finding]:
    """Shared memory and open files, which containers and logins limit."""
    shared = Path("/dev/shm")
    if torch.cuda.device_count() > 1 and shared.is_dir():
        size = shutil.disk_usage(shared).free
        detail = f"{size / 2**20:,.0f} MiB free in {shared}"
        if size < MIN_SHARED_MEMORY_BYTES:
            detail += f"; NCCL between GPUs wants {MIN_SHARED_MEMORY_BYTES // 2**20}"
            remedy = "start the container with --shm-size=2g"
            yield Finding(name="shared memory", status="warning", detail=detail, remedy=remedy)
        else:
            yield Finding(name="shared memory", status="ok", detail=detail)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES:
        detail = f"{files} may be open at once; a large corpus or checkpoint has more"
        yield Finding(name="open files", status="warning", detail=detail, remedy="ulimit -n 65536")
    else:
        yield Finding(name="open files", status="ok", detail=f"{files} may be open at once")


def nearest_existing(path: Path) -> Path:
    """``path``, or the first of the folders above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _disk(output: Path) -> Finding:
    folder = nearest_existing(output)
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / 1e9:,.0f} GB free for {output}"
    if not folder.is_dir():
        detail = f"{folder} is not a folder"
        return Finding(name="disk", status="problem", detail=detail, remedy="give another --output")
    if not os.access(folder, os.W_OK):
        return Finding(
            name="disk", status="problem", detail=f"{folder} cannot be written", remedy="give another --output"
        )
    # The 16B model's checkpoint is 94 GB, and two are kept.
    if usage.free < 50e9:
        detail += "; a checkpoint takes about 6 bytes a parameter, and two are kept"
        return Finding(name="disk", status="note", detail=detail, remedy="give an --output on a larger disk")
    return Finding(name="disk", status="ok", detail=detail)


def peers(cluster: Cluster | None, *, measure: bool) -> Iterator[Finding]:
    """Whether the GPUs of this host read each other's memory, and how fast."""
    count = torch.cuda.device_count()
    if count < 2:
        return
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    closed = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if closed:
        a, b = closed[0]
        yield Finding(
            name="peer access",
            status="warning",
            detail=f"GPU {a} cannot read GPU {b} ({len(closed)} of {len(pairs)} pairs); experts exchange rows by "
            "all-to-all instead, which is slower",
            remedy="nvidia-smi topo -p2p r shows why; inside a virtual machine the host must allow it",
        )
        return
    if not measure:
        yield Finding(name="peer access", status="ok", detail=f"between all {count} GPUs")
        return
    rates = {pair: _peer_rate(*pair) for pair in pairs}
    slowest = min(rates, key=lambda pair: rates[pair])
    detail = f"between all {count} GPUs; slowest copy {slowest[0]} to {slowest[1]}: {rates[slowest] / 1e9:.0f} GB/s"
    if cluster is not None and rates[slowest] < MIN_PEER_FRACTION * cluster.intra_node.bytes_per_second:
        detail += f"; {cluster.name} says {cluster.intra_node.bytes_per_second / 1e9:.0f}"
        remedy = (
            "nvidia-smi topo -m; measure the links: torchrun --nproc-per-node N -m moescale calibrate --output my.toml"
        )
        yield Finding(name="peer access", status="warning", detail=detail, remedy=remedy)
    else:
        yield Finding(name="peer access", status="ok", detail=detail)


def speed(cluster: Cluster | None) -> Iterator[Finding]:
    """A large GEMM and a copy on every GPU, against the cluster file and against each other."""
    count = torch.cuda.device_count()
    gemms = [_gemm_rate(torch.device("cuda", index)) for index in range(count)]
    copies = [copy_rate(torch.device("cuda", index)) for index in range(count)]
    for name, unit, rates, expected in (
        ("GEMM", 1e12, gemms, None if cluster is None else cluster.dense_gemm.flops_per_second[-1]),
        ("memory", 1e9, copies, None if cluster is None else cluster.memory_bytes_per_second),
    ):
        label = "TFLOP/s" if name == "GEMM" else "GB/s"
        yield compared(name, [rate / unit for rate in rates], None if expected is None else expected / unit, label)


def compared(name: str, rates: list[float], expected: float | None, unit: str) -> Finding:
    """The finding for ``rates`` of all GPUs against what a cluster file says, both in ``unit``."""
    measured = " ".join(f"{rate:,.0f}" for rate in rates)
    detail = f"{measured} {unit}"
    if min(rates) < (1 - TOLERANCE) * max(rates):
        slow = rates.index(min(rates))
        return Finding(
            name=f"{name} rate",
            status="warning",
            detail=f"{detail}: GPU {slow} is slower than the others, and all wait for the slowest",
            remedy="nvidia-smi -q -d PERFORMANCE,CLOCK shows a throttled or shared GPU",
        )
    if expected is None:
        return Finding(name=f"{name} rate", status="ok", detail=detail)
    ratio = statistics.median(rates) / expected
    detail += f", {ratio:.0%} of the cluster file's {expected:,.0f}"
    if abs(ratio - 1) > TOLERANCE:
        return Finding(
            name=f"{name} rate",
            status="warning",
            detail=f"{detail}; predictions would be off by as much",
            remedy="moescale calibrate --output my.toml, then compile --cluster my.toml",
        )
    return Finding(name=f"{name} rate", status="ok", detail=detail)


def _gemm_rate(device: torch.device) -> float:
    x = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).bfloat16()
    out = torch.empty_like(x)
    return 2.0 * GEMM_SIZE**3 / seconds_of(lambda: torch.mm(x, x, out=out), device=device)


def _peer_rate(first: int, second: int) -> float:
    device = torch.device("cuda", first)
    source = torch.empty(PEER_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty(PEER_BYTES, dtype=torch.uint8, device=torch.device("cuda", second))
    return source.numel() / seconds_of(lambda: target.copy_(source), device=device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class MachineUnfit(MoescaleError):
    """A check found a problem that stops moescale from working."""
