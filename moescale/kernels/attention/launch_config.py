"""How attention's Triton kernels are launched: block sizes by the widths of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moescale.kernels.backends import HOPPER

Kernel = Literal["forward", "backward_keys", "backward_queries"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch parameters of one kernel."""

    rows: int
    """Queries of a block."""
    columns: int
    """Keys of a block."""
    num_warps: int
    num_stages: int
    """Depth of the pipeline of loads."""


# The fastest of ten to twelve on an H100 (docs/decisions/0017-attention-over-intervals-in-triton.md).
_TABLES: tuple[tuple[int, dict[Kernel, Launch]], ...] = (
    (
        128,
        {
            "forward": Launch(rows=64, columns=64, num_warps=4, num_stages=3),
            "backward_keys": Launch(rows=64, columns=64, num_warps=4, num_stages=1),
            "backward_queries": Launch(rows=64, columns=32, num_warps=4, num_stages=2),
        },
    ),
    (
        256,
        {
            "forward": Launch(rows=64, columns=64, num_warps=4, num_stages=3),
            "backward_keys": Launch(rows=32, columns=64, num_warps=4, num_stages=2),
            "backward_queries": Launch(rows=64, columns=64, num_warps=4, num_stages=2),
        },
    ),
    (
        384,
        {
            "forward": Launch(rows=128, columns=64, num_warps=8, num_stages=3),
            "backward_keys": Launch(rows=64, columns=128, num_warps=8, num_stages=2),
            "backward_queries": Launch(rows=128, columns=64, num_warps=8, num_stages=3),
        },
    ),
    (
        512,
        {
            "forward": Launch(rows=128, columns=64, num_warps=8, num_stages=2),
            "backward_keys": Launch(rows=64, columns=64, num_warps=8, num_stages=2),
            "backward_queries": Launch(rows=128, columns=32, num_warps=8, num_stages=3),
        },
    ),
)
"""By the largest sum of the widths of keys and values that each is for."""
_SMALL = Launch(rows=64, columns=32, num_warps=4, num_stages=1)
"""For fp32, and for every GPU but Hopper's: fits into 99 KiB of shared memory at any width. Not tuned."""


def launch_for(
    kernel: Kernel, width: int, v_width: int, *, itemsize: int, capability: tuple[int, int] | None
) -> Launch:
    """Return the parameters of ``kernel`` for keys and values so wide, of ``itemsize`` bytes an element.

    ``capability`` is the GPU's; None, which is the interpreter, stands for a small one.
    """
    if itemsize > 2 or capability != HOPPER:
        return _SMALL
    return next(table[kernel] for most, table in _TABLES if width + v_width <= most)
