"""The state of torch's random number generators, as stored in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moescale.runtime.checkpoint_state import DamagedCheckpointError


def random_state(device: torch.device) -> dict[str, str | None]:
    """Return the states of the generators of the CPU and of ``device``, as hexadecimal digits."""
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "cpu_random_state": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda_random_state": bytes(cuda_state.tolist()).hex() if cuda_state is not None else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device, path: Path) -> None:
    """Set the generators to what :func:`random_state` returned; raises DamagedCheckpointError naming ``path``."""
    try:
        torch.set_rng_state(_bytes(state["cpu_random_state"]))
    except (RuntimeError, TypeError) as error:
        raise DamagedCheckpointError(f"{path}: cpu_random_state: {error}") from error
    if device.type == "cuda" and state["cuda_random_state"] is not None:
        torch.cuda.set_rng_state(_bytes(state["cuda_random_state"]), device)


def _bytes(digits: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)
