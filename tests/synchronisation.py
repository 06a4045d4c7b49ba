"""Makes any wait of the host for the GPU an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def synchronisation_refused() -> Iterator[None]:
    """Within, torch raises where the host would wait for the GPU. Compile and warm up before."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
