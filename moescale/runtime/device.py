"""The device a run is on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from moescale.errors import ConfigError


def choose_device(requested: str) -> torch.device:
    """``auto`` takes the first GPU, or the CPU where there is none; a device asked for by name must exist."""
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


def make_deterministic() -> None:
    """Have every operator give the same bits on every run, where it has the choice; an error where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def available_host_bytes() -> float:
    """Host memory that can still be had, as the kernel estimates it; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
