"""Times work on a GPU by CUDA events, for measurements of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

COPY_BYTES = 2**30


def seconds_of(
    run: Callable[[], object],
    *,
    device: torch.device | None = None,
    repeats: int = 7,
    warm_up: int = 2,
    ahead_cycles: int = 2_000_000,
) -> float:
    """Return the median GPU seconds of one call of ``run`` on ``device`` (None: the current one), after a warm-up.

    Before each call the device sleeps for ``ahead_cycles``, so that the host can queue the launches.
    """
    with torch.cuda.device(device):
        for _ in range(warm_up):
            run()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(ahead_cycles)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, reads plus writes, of a copy on ``device``."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device=device)
