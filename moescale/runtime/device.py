"""The device of a run, and the host memory available to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moescale.errors import ConfigError


def choose_device(requested: str) -> torch.device:
    """Return the requested device, which must exist; ``auto`` is the first GPU, or the CPU without one."""
    if requested == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ConfigError(f"run.device ('{requested}') must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"run.device ('{requested}') must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"run.device ('{requested}') needs a CUDA device; torch sees none. Use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"run.device ('{requested}') must be below cuda:{torch.cuda.device_count()}")
        device = torch.device("cuda", device.index or 0)
    return device


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Within, every operator takes a deterministic algorithm; one without such an algorithm raises an error."""
    # Stays set: it sizes workspaces alone, and those made with it last as long as the process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def available_host_bytes() -> float:
    """Return the free host memory, by the kernel's estimate and this process's cgroups; infinite if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    of_host = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
    return min(of_host, available_cgroup_bytes())


def available_cgroup_bytes(root: Path = Path("/sys/fs/cgroup"), own_groups: Path = Path("/proc/self/cgroup")) -> float:
    """Return the memory left under the limits (v2) of this process's cgroup and its ancestors; infinite without any."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    left = float("inf")
    group = root / name
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            # Inactive page cache is counted as used, but reclaimed on demand.
            left = min(left, float(max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))))
    return left
